"""Causal attention by torch's fused kernel, without transformers' masks.

With "sdpa", transformers checks in every forward pass whether position ids restart, and the host waits for the device.
It makes no mask for an attention implementation without a mask function, so a model with CAUSAL computes the same
without waiting. The mask that keeps documents apart is made here.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from megaft.models.products import needs_fp32
from megaft.weights.loading.causal_lm import CausalLM

CAUSAL = "megaft_causal"
"""Attention implementation of transformers whose layers get no mask, and attend to all earlier tokens."""

FAMILIES = (GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Families whose attention needs no mask, unless a setting adds a window or attention of another kind."""


def attend_without_masks(model: CausalLM) -> None:
    """Make a model use CAUSAL attention, if its family and settings allow. It then takes no padding mask."""
    if not is_plainly_causal(model):
        return
    AttentionInterface.register(CAUSAL, causal_attention)
    model.set_attn_implementation(CAUSAL)
    base: Any = model.base_model
    base.warn_if_padding_and_no_attention_mask = _no_warning  # transformers' own reads the tokens


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' "sdpa" does; in fp32 where `needs_fp32` says so, since the backward pass is faster."""
    if needs_fp32(query):
        inputs = (query.float(), key.float(), value.float(), attention_mask)
        return sdpa_attention_forward(module, *inputs, **settings)[0].to(query.dtype), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def is_plainly_causal(model: CausalLM) -> bool:
    """Return True if all layers attend to all earlier tokens with torch's fused kernel."""
    config = model.config
    return (
        type(model) in FAMILIES
        and config._attn_implementation == "sdpa"
        and getattr(config, "is_causal", True) is not False
        and not getattr(config, "add_cross_attention", False)
        and getattr(config, "sliding_window", None) is None
        and {*(getattr(config, "layer_types", None) or ())} <= {"full_attention"}
    )


def takes_masks(model: CausalLM) -> bool:
    """Return True if the model needs an explicit mask to keep documents apart, because transformers makes none."""
    return model.config._attn_implementation == CAUSAL


def document_mask(document_ids: Int64[Tensor, "batch time"]) -> Bool[Tensor, "batch 1 time time"]:
    """Return the mask of causal attention within documents: True where a query (row) attends to a key (column)."""
    time = document_ids.shape[1]
    before = torch.ones(time, time, dtype=torch.bool, device=document_ids.device).tril()
    return (before & (document_ids[:, :, None] == document_ids[:, None, :])).unsqueeze(1)


def _no_warning(*_: Any) -> None:
    pass
