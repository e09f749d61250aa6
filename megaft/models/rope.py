"""Rotary positions that look at the length of the input: LongRoPE and dynamic NTK scaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def length_limit(config: Any) -> int | None:
    """Return the longest input whose states do not depend on how long it is; None where no input's do.

    LongRoPE takes one set of frequencies for inputs up to the original context and another for longer ones, dynamic
    NTK scaling a set for each longer length; transformers chooses by the last position of the whole batch.

    Args:
        config: A transformers configuration.
    """
    text = config.get_text_config()
    limits = []
    for parameters in _rope_parameters(getattr(text, "rope_parameters", None)):
        rope_type = str(parameters.get("rope_type", ""))
        if rope_type == "longrope":
            limits.append(parameters["original_max_position_embeddings"])
        elif "dynamic" in rope_type and not parameters.get("alpha"):  # HunYuan's alpha is a constant
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


def _rope_parameters(value: Any) -> Iterator[dict[str, Any]]:
    """Yield a setting's rotary parameters, of the model or of each kind of layer."""
    if isinstance(value, dict):
        if "rope_type" in value:
            yield value
        for one in value.values():
            yield from _rope_parameters(one)
