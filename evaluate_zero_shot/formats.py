"""Format metrics and counts for the report."""

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


def parse_number(value: Any) -> float | None:
    """Return a number of results.json, in which a float that is not finite is a string or null."""
    return None if value is None else float(value)


def format_metric(value: Any, metric: str) -> str:
    """Return a metric's value as text with a suitable number of digits; accuracy as a percentage."""
    parsed = parse_number(value)
    if parsed is None or math.isnan(parsed):
        return MISSING
    if math.isinf(parsed):
        is_overflow = metric.endswith("perplexity")  # although its nats are finite
        return f"> {sys.float_info.max:.2g}" if is_overflow else "∞" if parsed > 0 else "-∞"
    if metric == "accuracy":
        return f"{parsed * 100:.2f} %"
    if metric in TITLES and abs(parsed) >= 1e6:
        return f"{parsed:.3g}"
    return f"{parsed:,.4f}" if metric in ("byte_perplexity", "bits_per_byte") else f"{parsed:,.2f}"


def format_count(value: Any) -> str:
    """Return a count with commas between thousands."""
    return MISSING if value is None else f"{value:,}"
