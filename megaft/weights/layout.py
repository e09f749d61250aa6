"""Map parameters between transformers and megatron-core, whole or sharded over tensor-parallel ranks.

transformers' names and shapes are the canonical form: folders, checkpoints and models of any backend and number of
ranks are converted from and to it. Pure tensor arithmetic; does not need megatron-core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaft.weights.dimensions import Dimensions
from megaft.weights.families import Rule, family_of, model_dimensions

OUTPUT_LAYER = "lm_head.weight"
"""Name of the output layer's weight in transformers, in every family."""


def local(rule: Rule, sources: Sequence[Tensor], size: int, rank: int) -> Tensor:
    """Return the shard of rank `rank` of `size`, from the transformers parameters `rule.sources`."""
    tensors = [tensor.T if rule.is_transposed and tensor.ndim == 2 else tensor for tensor in sources]
    if rule.rows:
        missing = -rule.rows % size
        tensors = [F.pad(tensor, (0, 0, 0, missing)) for tensor in tensors]
    if rule.groups and len(tensors) == 1:
        tensors = list(tensors[0].chunk(3))
    if rule.axis is not None:
        tensors = [tensor.chunk(size, rule.axis)[rank] for tensor in tensors]
    if rule.groups:
        return torch.cat([tensor.unflatten(0, (rule.groups // size, -1)) for tensor in tensors], 1).flatten(0, 1)
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def whole(rule: Rule, shards: Sequence[Tensor], heads_per_group: int) -> dict[str, Tensor]:
    """Return the transformers parameters by name, from all ranks' shards: the inverse of `local`."""
    split = [_split_sources(rule, shard, len(shards), heads_per_group) for shard in shards]
    axis = rule.axis
    tensors = split[0] if axis is None else [torch.cat(shards_of, axis) for shards_of in zip(*split, strict=True)]
    if rule.rows:
        tensors = [tensor[: rule.rows] for tensor in tensors]
    if rule.groups and len(rule.sources) == 1:
        tensors = [torch.cat(tensors)]
    tensors = [tensor.T if rule.is_transposed and tensor.ndim == 2 else tensor for tensor in tensors]
    return {name: tensor.contiguous() for name, tensor in zip(rule.sources, tensors, strict=True)}


def _split_sources(rule: Rule, shard: Tensor, size: int, heads_per_group: int) -> list[Tensor]:
    if rule.groups:
        width = shard.shape[0] // (rule.groups // size) // (heads_per_group + 2)
        qkv = shard.unflatten(0, (rule.groups // size, -1)).split([heads_per_group * width, width, width], 1)
        return [rows.flatten(0, 1) for rows in qkv]
    return list(shard.chunk(len(rule.sources)))


@dataclass(frozen=True, slots=True)
class Layout:
    """The rules of one model, by megatron-core's parameter names."""

    rules: dict[str, Rule]
    dims: Dimensions

    def local(self, name: str, sources: Sequence[Tensor], size: int, rank: int) -> Tensor:
        """Return the shard of rank `rank` of `size` of the megatron-core parameter `name`."""
        return local(self.rules[name], sources, size, rank)

    def whole(self, name: str, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the transformers parameters in the megatron-core parameter `name`, from all ranks' shards."""
        return whole(self.rules[name], shards, self.dims.num_heads // self.dims.num_groups)

    def core_name_of(self, source: str) -> str:
        """Return the name of the megatron-core parameter that contains a transformers parameter."""
        return next(name for name, rule in self.rules.items() if source in rule.sources)


def layout_of(config: Any) -> Layout:
    """Return the layout of a model.

    Args:
        config: transformers' configuration.

    Raises:
        ConfigError: megatron-core does not support the family or a setting of the configuration.
        DataError: A dimension is invalid.
    """
    family = family_of(config)
    family.require_layout(config)
    dims = model_dimensions(config)
    head = {} if dims.is_tied else {"output_layer.weight": Rule((OUTPUT_LAYER,), 0, rows=dims.vocab_size)}
    return Layout(family.rules(dims) | head, dims)
