"""Map parameters between transformers and megatron-core, whole or sharded over tensor-parallel ranks.

transformers' names and shapes are the canonical form: folders, checkpoints and models of any backend and any number of
ranks are read as if they held those, and written from them. Pure arithmetic of tensors; megatron-core is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megaft.base.checks import require
from megaft.weights import shape

FAMILIES = ("gpt2", *shape.LLAMAS)
"""Model types of transformers that have a layout."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Mapping of one megatron-core parameter from transformers' parameters.

    Megatron keeps the queries, keys and values of an attention group together, so that a cut between groups is one
    between ranks, and of a gated layer each rank's gate before its values.
    """

    sources: tuple[str, ...]
    """Names of the parameters in transformers."""
    axis: Literal[0, 1] | None = None
    """Sharded axis of the matrix as (out, in); None if it is replicated."""
    groups: int = 0
    """Query groups of the whole model, where queries, keys and values lie together."""
    is_transposed: bool = False
    """True if transformers stores the matrix as (in, out), as GPT-2 does."""
    rows: int = 0
    """Vocabulary entries, if rows of zeros pad them to a multiple of the ranks."""


def local(rule: Rule, sources: Sequence[Tensor], size: int, rank: int) -> Tensor:
    """Return the shard of rank `rank` of `size`, from the parameters of transformers that the rule names."""
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
    """Return the parameters of transformers by name, from what every rank holds: the inverse of `local`."""
    apart = [_apart(rule, shard, len(shards), heads_per_group) for shard in shards]
    axis = rule.axis
    tensors = apart[0] if axis is None else [torch.cat(parts, axis) for parts in zip(*apart, strict=True)]
    if rule.rows:
        tensors = [tensor[: rule.rows] for tensor in tensors]
    if rule.groups and len(rule.sources) == 1:
        tensors = [torch.cat(tensors)]
    tensors = [tensor.T if rule.is_transposed and tensor.ndim == 2 else tensor for tensor in tensors]
    return {name: tensor.contiguous() for name, tensor in zip(rule.sources, tensors, strict=True)}


def _apart(rule: Rule, shard: Tensor, size: int, heads_per_group: int) -> list[Tensor]:
    if rule.groups:
        width = shard.shape[0] // (rule.groups // size) // (heads_per_group + 2)
        parts = shard.unflatten(0, (rule.groups // size, -1)).split([heads_per_group * width, width, width], 1)
        return [part.flatten(0, 1) for part in parts]
    return list(shard.chunk(len(rule.sources)))


@dataclass(frozen=True, slots=True)
class Layout:
    """The rules of one model, by megatron-core's names."""

    rules: dict[str, Rule]
    heads_per_group: int
    num_groups: int

    def local(self, name: str, sources: Sequence[Tensor], size: int, rank: int) -> Tensor:
        """Return the shard of rank `rank` of `size` of the megatron-core parameter `name`."""
        return local(self.rules[name], sources, size, rank)

    def whole(self, name: str, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the parameters of transformers that `name` of megatron-core is made of, from every rank's part."""
        return whole(self.rules[name], shards, self.heads_per_group)

    def rule_of(self, source: str) -> str:
        """Return the name in megatron-core of what holds a parameter of transformers."""
        return next(name for name, rule in self.rules.items() if source in rule.sources)


def layout_of(config: Any) -> Layout:
    """Return the layout of a model.

    Args:
        config: transformers' configuration.

    Raises:
        ConfigError: The family, or something in its configuration, has no counterpart in megatron-core.
    """
    require(
        config.model_type in FAMILIES,
        f"the model is of type {config.model_type}; --model.backend megatron and `megaft convert` know "
        f"{', '.join(FAMILIES)}; use --model.backend hugging-face.",
    )
    if config.model_type == "gpt2":
        return _gpt2(config)
    return _llama(config)


def _gpt2(config: Any) -> Layout:
    words = "transformer.wte.weight"
    rules = {
        "embedding.word_embeddings.weight": Rule((words,), 0, rows=config.vocab_size),
        "embedding.position_embeddings.weight": Rule(("transformer.wpe.weight",)),
    }
    for layer in range(config.n_layer):
        there, here = f"transformer.h.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            rules |= {
                f"{here}input_layernorm.{kind}": Rule((f"{there}ln_1.{kind}",)),
                f"{here}self_attention.linear_qkv.{kind}": Rule(
                    (f"{there}attn.c_attn.{kind}",), 0, groups=config.n_head, is_transposed=True
                ),
                f"{here}self_attention.linear_proj.{kind}": Rule(
                    (f"{there}attn.c_proj.{kind}",), 1 if kind == "weight" else None, is_transposed=True
                ),
                f"{here}pre_mlp_layernorm.{kind}": Rule((f"{there}ln_2.{kind}",)),
                f"{here}mlp.linear_fc1.{kind}": Rule((f"{there}mlp.c_fc.{kind}",), 0, is_transposed=True),
                f"{here}mlp.linear_fc2.{kind}": Rule(
                    (f"{there}mlp.c_proj.{kind}",), 1 if kind == "weight" else None, is_transposed=True
                ),
            }
    rules |= {f"decoder.final_layernorm.{kind}": Rule((f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias")}
    return Layout(rules | _output_layer(config), 1, config.n_head)


def _llama(config: Any) -> Layout:
    words = "model.embed_tokens.weight"
    groups = config.num_key_value_heads
    rules = {"embedding.word_embeddings.weight": Rule((words,), 0, rows=config.vocab_size)}
    has_qkv_bias, has_bias = biases_of(config)
    for layer in range(config.num_hidden_layers):
        there, here = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention, mlp = f"{there}self_attn.", f"{there}mlp."
        rules[f"{here}input_layernorm.weight"] = Rule((f"{there}input_layernorm.weight",))
        for kind in ("weight", *(["bias"] if has_qkv_bias else [])):
            sources = tuple(f"{attention}{part}_proj.{kind}" for part in "qkv")
            rules[f"{here}self_attention.linear_qkv.{kind}"] = Rule(sources, 0, groups=groups)
        for kind in ("weight", *(["bias"] if has_bias else [])):
            inner = 1 if kind == "weight" else None
            rules |= {
                f"{here}self_attention.linear_proj.{kind}": Rule((f"{attention}o_proj.{kind}",), inner),
                f"{here}mlp.linear_fc1.{kind}": Rule((f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"), 0),
                f"{here}mlp.linear_fc2.{kind}": Rule((f"{mlp}down_proj.{kind}",), inner),
            }
        rules[f"{here}pre_mlp_layernorm.weight"] = Rule((f"{there}post_attention_layernorm.weight",))
    rules["decoder.final_layernorm.weight"] = Rule(("model.norm.weight",))
    return Layout(rules | _output_layer(config), config.num_attention_heads // groups, groups)


def _output_layer(config: Any) -> dict[str, Rule]:
    if config.tie_word_embeddings:
        return {}
    return {"output_layer.weight": Rule(("lm_head.weight",), 0, rows=config.vocab_size)}


def biases_of(config: Any) -> tuple[bool, bool]:
    """Return whether queries, keys and values have biases, and whether all other matrices have.

    Raises:
        ConfigError: Some of the others have biases and some not, which megatron-core cannot say.
    """
    if config.model_type == "gpt2":
        return True, True
    if config.model_type == "qwen2":
        return True, False
    in_attention, in_mlp = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    require(
        in_attention == in_mlp,
        f"the model has attention_bias {in_attention} and mlp_bias {in_mlp}, which megatron-core cannot tell apart; "
        "use --model.backend hugging-face.",
    )
    return in_attention, in_attention


def require_cuttable(config: Any, size: int) -> None:
    """Raise ConfigError unless transformers' model can be cut over `size` ranks; see `megaft.weights.shape`."""
    groups = layout_of(config).num_groups
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    shape.require_cuttable(groups, inner, config.vocab_size, size, "--parallel.tensor-parallel-size")
