"""Metrics that are limits, not measurements: a protocol's cap, float overflow, and nats that are not finite."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from evaluate_zero_shot.formats import parse_number
from evaluate_zero_shot.protocols import Protocol

ALL_METRICS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "accuracy")
OVERFLOW_LABEL = f"above {sys.float_info.max:.2g}"
"""Label of a perplexity that overflows a float although its nats are finite."""


def is_capped(value: float | None, protocol: Protocol) -> bool:
    """Return True if a perplexity is at the protocol's cap, such as Megatron-LM's e^20."""
    limit = protocol.exponent_limit
    return value is not None and limit is not None and value >= math.exp(limit)


def has_finite_nats(result: Mapping[str, Any]) -> bool:
    """Return True if the nats of an entry of results.json are finite; earlier versions recorded NaN too."""
    nats = parse_number(result.get("nats"))
    return nats is None or math.isfinite(nats)


def without_metrics(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry without its metrics, which mean nothing if the nats are not finite."""
    return {**result, **dict.fromkeys((*ALL_METRICS, "confidence_interval_95"))}


def remarks(result: Mapping[str, Any], protocol: Protocol) -> list[str]:
    """Return the remarks on an entry's headline metric if it is a limit."""
    if not has_finite_nats(result):
        return ["nats are not finite: no metrics"]
    headline = result.get("headline")
    value = parse_number(result.get(headline)) if headline and headline.endswith("perplexity") else None
    return [
        *([f"capped at e^{protocol.exponent_limit:g} by the protocol"] if is_capped(value, protocol) else []),
        *([f"{OVERFLOW_LABEL}: finite nats, too few words"] if value == math.inf else []),
    ]
