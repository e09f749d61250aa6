"""Figures that are a limit instead of a measurement: a protocol's cap, the largest float, nats that are not finite."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from evaluate_zero_shot.formats import number
from evaluate_zero_shot.protocols import Protocol

FIGURES = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "accuracy")
LARGEST = f"above {sys.float_info.max:.2g}"
"""Label of an infinite perplexity whose nats are finite: its exponential is no float."""


def is_capped(value: float | None, protocol: Protocol) -> bool:
    """Return whether a perplexity is at the protocol's cap, such as Megatron-LM's e^20."""
    limit = protocol.exponent_limit
    return value is not None and limit is not None and value >= math.exp(limit)


def has_finite_nats(result: Mapping[str, Any]) -> bool:
    """Return whether the nats of an entry of results.json are finite; an earlier version wrote figures of NaN."""
    nats = number(result.get("nats"))
    return nats is None or math.isfinite(nats)


def without_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return an entry with no figure, as one whose nats are not finite should have been written."""
    return {**result, **dict.fromkeys((*FIGURES, "confidence_interval_95"))}


def remarks(result: Mapping[str, Any], protocol: Protocol) -> list[str]:
    """Return a remark for each kind of limit that an entry's headline figure is."""
    if not has_finite_nats(result):
        return ["nats are not finite: no figure"]
    headline = result.get("headline")
    value = number(result.get(headline)) if headline and headline.endswith("perplexity") else None
    return [
        *([f"capped at e^{protocol.exponent_limit:g} by the protocol"] if is_capped(value, protocol) else []),
        *([f"{LARGEST}: finite nats, too few words"] if value == math.inf else []),
    ]
