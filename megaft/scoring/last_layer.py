"""Last-layer pruning: compute hidden states at scored positions only; other positions contribute keys and values.

A window of stride 32 scores 32 of its 1024 positions. Every layer but the last needs all positions, as keys and values
of the next layer; the last layer's queries, output projection and MLP and the final norm are needed only at scored
positions. The skipped values are never read, so the result is the same, up to 1 / num_layers cheaper.

tools/benchmarks/last_layer.py measures the CPU time that this saves; see results/last_layer_*.md there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import rotate_half
from transformers.pytorch_utils import Conv1D

from megaft.models.attention import CAUSAL
from megaft.models.loss import at_positions
from megaft.scoring.batch import ScoringBatch, to_device
from megaft.scoring.packed import PackedLinear

LLAMA_LIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Families that equal Llama except for biases and norms of queries and keys."""


class AnyTrunk(nn.Module):
    """A model of any family without its output layer, computed at all positions."""

    def __init__(self, language_model: Any):
        super().__init__()
        self.base = language_model.base_model

    def forward(self, batch: ScoringBatch) -> Float[Tensor, "scored width"]:
        """Return the hidden states of the scored positions, row by row."""
        return batch.select(self.base(input_ids=batch.input_ids, use_cache=False).last_hidden_state)


class GPT2Trunk(nn.Module):
    """GPT-2 without its output layer."""

    def __init__(self, language_model: Any):
        super().__init__()
        self.base: Any = language_model.transformer
        self.last = GPT2LastLayer(self.base.h[-1])

    def forward(self, batch: ScoringBatch) -> Float[Tensor, "scored width"]:
        """Return the hidden states of the scored positions, row by row."""
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        hidden = self.base.wte(batch.input_ids) + self.base.wpe(positions)
        for layer in self.base.h[:-1]:
            hidden = layer(hidden)
        return self.base.ln_f(self.last(hidden, batch))


class GPT2LastLayer(nn.Module):
    """The last block. It shares the fused projection, which it splits, so ZeRO-3's hooks gather the weight here."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer
        self.weight: Any = layer.attn.c_attn.weight
        self.bias: Any = layer.attn.c_attn.bias
        width = layer.attn.embed_dim  # the weight itself may be partitioned, without its shape
        self.projections = (slice(0, width), slice(width, None))
        """Columns of the queries, and of the keys and values."""
        self.packed: nn.ModuleList | None = None

    def pack(self) -> None:
        """Pack the weight matrices for inference on CPU."""
        self.packed = nn.ModuleList(
            PackedLinear(self.weight[:, columns].T, self.bias[columns]) for columns in self.projections
        )
        self.weight = self.bias = None

    def forward(self, hidden: Float[Tensor, "batch time width"], batch: ScoringBatch) -> Float[Tensor, "scored width"]:
        """Return the layer's output at the scored positions."""
        attention = self.layer.attn
        normed = self.layer.ln_1(hidden)
        pruned = pruned_queries(batch)
        queries = self._project(pruned.gather(normed) if pruned else normed, 0)
        keys, values = self._project(normed, 1).chunk(2, dim=1)
        attended = attend(queries, keys, values, pruned, attention.scaling)
        hidden = batch.select(hidden) + attention.c_proj((pruned or batch).select(attended))
        return hidden + self.layer.mlp(self.layer.ln_2(hidden))

    def _project(self, states: Tensor, index: int) -> Tensor:
        if self.packed is not None:
            projected = self.packed[index](states)
        else:
            columns = self.projections[index]
            projected = torch.addmm(self.bias[columns], states.flatten(0, 1), self.weight[:, columns])
        return projected.view(*states.shape[:2], -1, self.layer.attn.head_dim).transpose(1, 2)


class LlamaTrunk(nn.Module):
    """Llama, or another of LLAMA_LIKE, without its output layer."""

    def __init__(self, language_model: Any):
        super().__init__()
        self.base: Any = language_model.model
        self.last = LlamaLastLayer(self.base.layers[-1])

    def forward(self, batch: ScoringBatch) -> Float[Tensor, "scored width"]:
        """Return the hidden states of the scored positions, row by row."""
        positions = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device).unsqueeze(0)
        hidden = self.base.embed_tokens(batch.input_ids)
        rotation = self.base.rotary_emb(hidden, position_ids=positions)
        for layer in self.base.layers[:-1]:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotation)
        return self.base.norm(self.last(hidden, rotation, batch))


class LlamaLastLayer(nn.Module):
    """The last decoder layer."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        rotation: tuple[Float[Tensor, "1 time head_width"], Float[Tensor, "1 time head_width"]],
        batch: ScoringBatch,
    ) -> Float[Tensor, "scored width"]:
        """Return the layer's output at the scored positions; `rotation` has the cosine and sine of each position."""
        attention = self.layer.self_attn
        normed = self.layer.input_layernorm(hidden)
        pruned = pruned_queries(batch)
        queries = self._heads(pruned.gather(normed) if pruned else normed, "q")
        query_rotation = [angles[0][pruned.columns] for angles in rotation] if pruned else rotation
        keys, values = rotated(self._heads(normed, "k"), *rotation), self._heads(normed, "v")
        attended = attend(rotated(queries, *query_rotation), keys, values, pruned, attention.scaling)
        hidden = batch.select(hidden) + attention.o_proj((pruned or batch).select(attended))
        return hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))

    def _heads(self, states: Tensor, kind: str) -> Tensor:
        attention = self.layer.self_attn
        heads = getattr(attention, f"{kind}_proj")(states).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)  # Qwen3 normalizes queries and keys
        return (heads if norm is None else norm(heads)).transpose(1, 2)


def fast_trunk(language_model: Any) -> GPT2Trunk | LlamaTrunk | None:
    """Return a trunk with last-layer pruning if the architecture is supported, else None."""
    if language_model.config._attn_implementation not in ("sdpa", CAUSAL):  # others need a mask for causality
        return None
    # A sliding window needs a mask. Choosing per batch would hang under ZeRO-3: all ranks must call the same modules.
    if getattr(language_model.config, "sliding_window", None) is not None:
        return None
    family = type(language_model)
    if family is GPT2LMHeadModel and type(language_model.transformer.h[-1].attn.c_attn) is Conv1D:  # no adapter
        return GPT2Trunk(language_model)
    return LlamaTrunk(language_model) if family in LLAMA_LIKE else None


@dataclass(frozen=True, slots=True)
class PrunedQueries:
    """Columns of each row whose queries are computed: all scored ones, and others where rows have fewer."""

    columns: Int64[Tensor, "batch queries"]
    positions: Int64[Tensor, " scored"]
    """Scored positions of the flattened queries, row by row."""

    def gather(self, states: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch queries width"]:
        """Return each row's states at its columns."""
        rows = torch.arange(len(self.columns), device=self.columns.device).unsqueeze(1)
        return states[rows, self.columns]

    def select(self, states: Float[Tensor, "batch queries width"]) -> Float[Tensor, "scored width"]:
        """Return the states of the scored positions, dropping the padding queries."""
        return at_positions(states, self.positions)


def pruned_queries(batch: ScoringBatch) -> PrunedQueries | None:
    """Return the queries to compute; None for those of all columns.

    Causal attention over all columns needs no mask, which halves its work, so pruning pays only if at most half the
    columns are scored.
    """
    device = batch.input_ids.device
    queries = num_queries(batch.is_scored, device.type)
    if 2 * queries > batch.is_scored.shape[1]:
        return None
    columns = np.argsort(~batch.is_scored, axis=1, kind="stable")[:, :queries]
    positions = np.flatnonzero(np.take_along_axis(batch.is_scored, columns, 1))
    return PrunedQueries(to_device(columns, device), to_device(positions, device))


def num_queries(is_scored: Bool[np.ndarray, "batch time"], device_type: str) -> int:
    """Return how many queries each row needs; on CUDA a power of two, because cuDNN plans each new shape."""
    queries = max(1, int(is_scored.sum(1).max()))
    return 1 << (queries - 1).bit_length() if device_type == "cuda" else queries


def attend(
    queries: Float[Tensor, "batch heads queries head_width"],
    keys: Float[Tensor, "batch key_heads time head_width"],
    values: Float[Tensor, "batch key_heads time head_width"],
    pruned: PrunedQueries | None,
    scaling: float,
) -> Float[Tensor, "batch queries width"]:
    """Return causal attention of the pruned queries; None means one query per column."""
    if pruned is None:
        attended = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=keys.shape[1] < queries.shape[1]
        )
        return attended.transpose(1, 2).flatten(2)
    # Query heads that share a key head become extra queries of it: nothing is copied, and any kernel works.
    groups = queries.shape[1] // keys.shape[1]
    is_past = torch.arange(keys.shape[2], device=keys.device) <= pruned.columns[:, None, :, None]
    grouped = queries.reshape(*keys.shape[:2], -1, queries.shape[-1])
    attended = F.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=is_past.repeat(1, 1, groups, 1), scale=scaling
    )
    return attended.reshape(queries.shape).transpose(1, 2).flatten(2)


def rotated(
    heads: Float[Tensor, "batch heads time head_width"],
    cosine: Float[Tensor, "#batch time head_width"],
    sine: Float[Tensor, "#batch time head_width"],
) -> Float[Tensor, "batch heads time head_width"]:
    """Return heads rotated by rotary embeddings (Su et al. 2021), in transformers' order of operations."""
    return heads * cosine.unsqueeze(1) + rotate_half(heads) * sine.unsqueeze(1)
