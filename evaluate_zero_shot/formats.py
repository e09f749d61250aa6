"""Format numbers for a report."""

from __future__ import annotations

import math
import sys
from typing import Any

TITLES = {
    "word_perplexity": "word perplexity",
    "perplexity": "token perplexity",
    "byte_perplexity": "byte perplexity",
    "bits_per_byte": "bits per byte",
    "bits_per_character": "bits per character",
    "accuracy": "accuracy",
}
MISSING = "—"


def number(value: Any) -> float | None:
    """Return a number of results.json, where a float that is not finite is a string, or null."""
    return None if value is None else float(value)


def written(value: Any, metric: str) -> str:
    """Return a metric's value in readable digits: accuracy, a fraction, as a percentage."""
    found = number(value)
    if found is None or math.isnan(found):
        return MISSING
    if math.isinf(found):
        is_overflow = metric.endswith("perplexity")  # of nats that are finite
        return f"> {sys.float_info.max:.2g}" if is_overflow else "∞" if found > 0 else "-∞"
    if metric == "accuracy":
        return f"{found * 100:.2f} %"
    if metric in TITLES and abs(found) >= 1e6:
        return f"{found:.3g}"
    return f"{found:,.4f}" if metric in ("byte_perplexity", "bits_per_byte") else f"{found:,.2f}"


def counted(value: Any) -> str:
    """Return a count with its thousands apart."""
    return MISSING if value is None else f"{value:,}"
