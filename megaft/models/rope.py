"""Rotary embeddings that depend on the length of the input: LongRoPE and dynamic NTK scaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def length_limit(config: Any) -> int | None:
    """Return the longest input whose rotary frequencies do not depend on its length; None if there is no such limit.

    Args:
        config: A transformers configuration.
    """
    return min((length for length, _ in rescaling_lengths(config)), default=None)


def rescaling_lengths(config: Any) -> list[tuple[int, bool]]:
    """Return pairs of a length beyond which rotary frequencies change, and True if they change with every length.

    LongRoPE has one set of frequencies for inputs up to the original context and another for longer inputs; dynamic NTK
    scaling has a set for each longer length. transformers chooses by the last position of the whole batch.

    Args:
        config: A transformers configuration.
    """
    text = config.get_text_config()
    lengths = []
    for parameters in _rope_parameters(getattr(text, "rope_parameters", None)):
        rope_type = str(parameters.get("rope_type", ""))
        if rope_type == "longrope":
            lengths.append((parameters["original_max_position_embeddings"], False))
        elif "dynamic" in rope_type and not parameters.get("alpha"):  # HunYuan's alpha is a constant
            lengths.append((text.max_position_embeddings, True))
    return lengths


def _rope_parameters(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the rotary parameters in a setting: the model's, or those of each layer type."""
    if isinstance(value, dict):
        if "rope_type" in value:
            yield value
        for nested in value.values():
            yield from _rope_parameters(nested)
