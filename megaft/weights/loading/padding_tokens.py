"""Attention to padding tokens inside a text, as to other tokens, in families that would mask them."""

from __future__ import annotations

from typing import Any

import torch

COUNTS_PADDING = ("xlm",)
"""Families that count a row's padding tokens, wherever they stand, and ignore as many places at its end."""


def read_padding_tokens(model: Any) -> Any:
    """Return the model, which reads padding tokens like any other: families that count them get a mask of ones.

    Without a mask their states depend on later tokens, even where the configuration makes them causal.
    """
    if model.config.model_type in COUNTS_PADDING:
        model.base_model.register_forward_pre_hook(_with_mask, with_kwargs=True)
    return model


def _with_mask(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if options.get("attention_mask") is None:
        input_ids = inputs[0] if inputs else options["input_ids"]
        options = options | {"attention_mask": torch.ones_like(input_ids)}
    return inputs, options
