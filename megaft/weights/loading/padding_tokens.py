"""Attend to padding tokens inside a text, in families that mask them when given no attention mask."""

from __future__ import annotations

from typing import Any

import torch

COUNTS_PADDING = ("xlm",)
"""Families that count a row's padding tokens, wherever they stand, and mask that many positions at its end."""


def attend_to_padding_tokens(model: Any) -> Any:
    """Treat padding tokens like any other: families that count them get an attention mask of ones.

    Without a mask their states depend on later tokens, even with a causal configuration.
    """
    if model.config.model_type in COUNTS_PADDING:
        model.base_model.register_forward_pre_hook(_with_mask, with_kwargs=True)
    return model


def _with_mask(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if options.get("attention_mask") is None:
        input_ids = inputs[0] if inputs else options["input_ids"]
        options = options | {"attention_mask": torch.ones_like(input_ids)}
    return inputs, options
