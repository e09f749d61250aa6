"""Model families of the megatron backend: all family-specific names, shapes and layouts.

To add a family whose layers are GPT-2's or Llama's, add an entry to FAMILIES. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from megaft.base.checks import require
from megaft.weights.config_values import ConfigValues
from megaft.weights.dimensions import Dimensions


@dataclass(frozen=True, slots=True)
class Rule:
    """Mapping of one megatron-core parameter from transformers' parameters.

    Megatron stores the queries, keys and values of an attention group together, so that ranks split between groups. In
    a gated layer each rank's gate rows precede its up rows.
    """

    sources: tuple[str, ...]
    """Names of the parameters in transformers."""
    axis: Literal[0, 1] | None = None
    """Sharded axis of the matrix as (out, in); None if it is replicated."""
    groups: int = 0
    """Query groups of the whole model, for a fused matrix of queries, keys and values."""
    is_transposed: bool = False
    """True if transformers stores the matrix as (in, out), as GPT-2 does."""
    rows: int = 0
    """Vocabulary entries, if zero rows pad them to a multiple of the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Names, layout and computation of a family's models in transformers."""

    read: Callable[[Family, ConfigValues, float | None], Dimensions]
    """Returns the dimensions in a config.json, with the residual stream's dropout replaced if one is given."""
    rules: Callable[[Dimensions], dict[str, Rule]]
    """Returns a rule for each parameter of megatron-core, except the output layer's."""
    require_layout: Callable[[Any], None]
    """Raises ConfigError for parameters that megatron-core does not have."""
    require_modules: Callable[[Any], None]
    """Raises ConfigError for attention or dropout that the megatron backend does not build."""
    base_prefix: str
    """transformers' prefix of the base model's parameter names, which files may omit."""
    embedding: str
    """Name of the token embedding."""
    activations: tuple[str, ...]
    """Activations of the MLP that the megatron backend supports."""
    epsilon: str
    """Name of the norms' epsilon in config.json."""
    attention_dropout: str
    """Name of attention's dropout probability in config.json."""
    trains_padding: bool
    """True if the embedding of the padding token has a gradient."""
    residual_outputs: str | None = None
    """Name suffix of the matrices that write to the residual stream, if initialization scales them by depth."""
    default_groups: int | None = None
    """Key and value heads if config.json omits them; None for the number of query heads."""
    biases: tuple[bool, bool] | None = None
    """Biases of queries, keys and values, and of the other matrices; None if config.json sets them."""


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    Raises:
        ConfigError: The megatron backend does not support it.
    """
    require(
        config.model_type in FAMILIES,
        f"the model's model_type is {config.model_type}; --model.backend megatron and `megaft convert` support "
        f"{', '.join(FAMILIES)}; train or score other families with --model.backend hugging-face.",
    )
    return FAMILIES[config.model_type]


def dimensions_of(config: dict[str, Any], dropout: float | None = None, source: str = "config.json") -> Dimensions:
    """Return the dimensions of a transformers configuration, with transformers' defaults for missing keys.

    Args:
        config: Content of config.json.
        dropout: Replaces the configuration's dropout of the residual stream, in families that have it.
        source: File or name of the configuration, for messages.

    Raises:
        ConfigError: The family is not supported.
        DataError: A dimension is invalid.
    """
    kind = config.get("model_type")
    require(
        kind in FAMILIES,
        f"the model's model_type is {kind}; megaft estimate supports {', '.join(FAMILIES)}; give one of these.",
    )
    family = FAMILIES[str(kind)]
    return family.read(family, ConfigValues(config, source), dropout)


def attention_dropout_of(config: dict[str, Any], source: str = "config.json") -> float:
    """Return the attention dropout probability of a transformers configuration; arguments as for `dimensions_of`."""
    family = FAMILIES[config["model_type"]]
    default = 0.1 if family.attention_dropout == "attn_pdrop" else 0.0
    return ConfigValues(config, source).fraction(family.attention_dropout, default)


def model_dimensions(config: Any) -> Dimensions:
    """Return the dimensions of a transformers configuration; raises as `dimensions_of`."""
    return dimensions_of(config.to_dict(), source=config.name_or_path or "config.json")


# GPT-2: LayerNorm, learned positions, biases everywhere, one matrix of queries, keys and values, stored as (in, out).


def _gpt2_dimensions(family: Family, values: ConfigValues, dropout: float | None) -> Dimensions:
    width, heads = values.positive_int("n_embd", 768), values.positive_int("n_head", 12)
    values.require_multiple("n_embd", width, "n_head", heads)
    own_dropout = values.fraction("resid_pdrop", 0.1)
    qkv_bias, other_bias = family.biases or (True, True)
    return Dimensions(
        norm="LayerNorm",
        is_gated=False,
        has_position_embedding=True,
        num_layers=values.positive_int("n_layer", 12),
        width=width,
        num_heads=heads,
        num_groups=heads,
        head_width=width // heads,
        inner_width=values.positive_int("n_inner", 4 * width, null=4 * width),
        vocab_size=values.positive_int("vocab_size", 50_257),
        num_positions=values.positive_int("n_positions", 1024),
        is_tied=values.flag("tie_word_embeddings", True),
        has_qkv_bias=qkv_bias,
        has_bias=other_bias,
        activation=values.config.get("activation_function", "gelu_new"),
        dropout=own_dropout if dropout is None else dropout,
    )


def _gpt2_rules(dims: Dimensions) -> dict[str, Rule]:
    rules = {
        "embedding.word_embeddings.weight": Rule(("transformer.wte.weight",), 0, rows=dims.vocab_size),
        "embedding.position_embeddings.weight": Rule(("transformer.wpe.weight",)),
    }
    for layer in range(dims.num_layers):
        source, target = f"transformer.h.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            rules |= {
                f"{target}input_layernorm.{kind}": Rule((f"{source}ln_1.{kind}",)),
                f"{target}self_attention.linear_qkv.{kind}": Rule(
                    (f"{source}attn.c_attn.{kind}",), 0, groups=dims.num_groups, is_transposed=True
                ),
                f"{target}self_attention.linear_proj.{kind}": Rule(
                    (f"{source}attn.c_proj.{kind}",), 1 if kind == "weight" else None, is_transposed=True
                ),
                f"{target}pre_mlp_layernorm.{kind}": Rule((f"{source}ln_2.{kind}",)),
                f"{target}mlp.linear_fc1.{kind}": Rule((f"{source}mlp.c_fc.{kind}",), 0, is_transposed=True),
                f"{target}mlp.linear_fc2.{kind}": Rule(
                    (f"{source}mlp.c_proj.{kind}",), 1 if kind == "weight" else None, is_transposed=True
                ),
            }
    final = {f"decoder.final_layernorm.{kind}": Rule((f"transformer.ln_f.{kind}",)) for kind in ("weight", "bias")}
    return rules | final


def _gpt2_modules(config: Any) -> None:
    require(
        config.resid_pdrop == config.embd_pdrop,
        f"the model has resid_pdrop {config.resid_pdrop} and embd_pdrop {config.embd_pdrop}, but megatron-core has one "
        "probability for both; set --model.dropout.",
    )
    _require_plain_attention(config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights)


_GPT2 = Family(
    read=_gpt2_dimensions,
    rules=_gpt2_rules,
    require_layout=lambda config: None,
    require_modules=_gpt2_modules,
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    activations=("gelu_new", "gelu", "relu"),
    epsilon="layer_norm_epsilon",
    attention_dropout="attn_pdrop",
    trains_padding=True,
    residual_outputs="c_proj.weight",
    biases=(True, True),
)

# Llama: RMSNorm, rotary positions, grouped keys and values, a gated MLP, few or no biases.


def _llama_dimensions(family: Family, values: ConfigValues, _: float | None) -> Dimensions:
    width, heads = values.positive_int("hidden_size", 4096), values.positive_int("num_attention_heads", 32)
    if values.config.get("head_dim") is None:
        values.require_multiple("hidden_size", width, "num_attention_heads", heads)
    groups = values.positive_int("num_key_value_heads", family.default_groups or heads, null=heads)
    values.require_multiple("num_attention_heads", heads, "num_key_value_heads", groups)
    has_bias = values.flag("attention_bias", False)
    qkv_bias, other_bias = family.biases or (has_bias, has_bias)
    return Dimensions(
        norm="RMSNorm",
        is_gated=True,
        has_position_embedding=False,
        num_layers=values.positive_int("num_hidden_layers", 32),
        width=width,
        num_heads=heads,
        num_groups=groups,
        head_width=values.positive_int("head_dim", width // heads, null=width // heads),
        inner_width=values.positive_int("intermediate_size", 11_008),
        vocab_size=values.positive_int("vocab_size", 32_000),
        num_positions=values.positive_int("max_position_embeddings", 2048),
        is_tied=values.flag("tie_word_embeddings", False),
        has_qkv_bias=qkv_bias,
        has_bias=other_bias,
        activation=values.config.get("hidden_act", "silu"),
        dropout=0.0,
    )


def _llama_rules(dims: Dimensions) -> dict[str, Rule]:
    rules = {"embedding.word_embeddings.weight": Rule(("model.embed_tokens.weight",), 0, rows=dims.vocab_size)}
    for layer in range(dims.num_layers):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        attention, mlp = f"{source}self_attn.", f"{source}mlp."
        rules[f"{target}input_layernorm.weight"] = Rule((f"{source}input_layernorm.weight",))
        for kind in ("weight", *(["bias"] if dims.has_qkv_bias else [])):
            sources = tuple(f"{attention}{letter}_proj.{kind}" for letter in "qkv")
            rules[f"{target}self_attention.linear_qkv.{kind}"] = Rule(sources, 0, groups=dims.num_groups)
        for kind in ("weight", *(["bias"] if dims.has_bias else [])):
            inner = 1 if kind == "weight" else None
            rules |= {
                f"{target}self_attention.linear_proj.{kind}": Rule((f"{attention}o_proj.{kind}",), inner),
                f"{target}mlp.linear_fc1.{kind}": Rule((f"{mlp}gate_proj.{kind}", f"{mlp}up_proj.{kind}"), 0),
                f"{target}mlp.linear_fc2.{kind}": Rule((f"{mlp}down_proj.{kind}",), inner),
            }
        rules[f"{target}pre_mlp_layernorm.weight"] = Rule((f"{source}post_attention_layernorm.weight",))
    return rules | {"decoder.final_layernorm.weight": Rule(("model.norm.weight",))}


def _llama_layout(config: Any) -> None:
    in_attention, in_mlp = getattr(config, "attention_bias", False), getattr(config, "mlp_bias", False)
    require(
        in_attention == in_mlp,
        f"the model has attention_bias {in_attention} and mlp_bias {in_mlp}, but megatron-core has one switch for "
        "both; train or score it with --model.backend hugging-face.",
    )


def _llama_modules(config: Any) -> None:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    _require_plain_attention(window is not None and window < config.max_position_embeddings)


def _require_plain_attention(is_unusual: bool) -> None:
    require(
        not is_unusual,
        "the model scales attention scores or uses a sliding window, which --model.backend megatron does not support; "
        "use --model.backend hugging-face.",
    )


_LLAMA = Family(
    read=_llama_dimensions,
    rules=_llama_rules,
    require_layout=_llama_layout,
    require_modules=_llama_modules,
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    activations=("silu",),
    epsilon="rms_norm_eps",
    attention_dropout="attention_dropout",
    trains_padding=False,
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, default_groups=8),
    "qwen2": replace(_LLAMA, default_groups=32, biases=(True, False), require_layout=lambda config: None),
}
"""Supported families by transformers' model_type."""
