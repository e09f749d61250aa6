"""Causal language models of transformers: their type, vocabulary size and context limit."""

from __future__ import annotations

from typing import Any

CausalLM = Any
"""A transformers `...ForCausalLM`, whose attributes differ from family to family."""


def context_limit(model: CausalLM) -> int | None:
    """Return the maximum input length, or None without a limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit is None or limit > 0 else None  # XLNet has no limit and says -1


def vocab_size(model: CausalLM) -> int:
    """Return the number of vocabulary entries of the model's embedding."""
    return model.config.get_text_config().vocab_size
