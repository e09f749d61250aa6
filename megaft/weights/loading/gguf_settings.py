"""Compare the settings of a GGUF file that affect logits with the model that transformers built from it.

transformers' reader uses some of them, has fixed values for others, and silently ignores the rest.
Keys: gguf.constants.Keys, and https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaft.base.errors import DataError
from megaft.base.gguf import GgufHeader

_SHAPES = frozenset(
    (
        "vocab_size",
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "expert_count",
        "expert_shared_count",
        "expert_feed_forward_length",
        "expert_shared_feed_forward_length",
        "embedding_length_per_layer_input",
        "leading_dense_block_count",
        "use_parallel_residual",
        "interleave_moe_layer_step",
        "moe_every_n_layers",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
        "shortconv.l_cache",
        "ssm.conv_kernel",
        "ssm.inner_size",
        "ssm.state_size",
        "ssm.time_step_rank",
    )
)
"""Settings that the tensors' shapes or presence imply (StableLM's parallel residual too); transformers checks them."""

_NO_EFFECT = frozenset(
    ("context_length", "tensor_data_layout", "pooling_type", "nextn_predict_layers", "n_deepstack_layers")
)
"""Settings without effect on logits. Additional layers are detected by their tensors."""

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_CONFIG = {
    "attention.head_count": ("num_attention_heads",),
    "attention.layer_norm_epsilon": _EPSILONS,
    "attention.layer_norm_rms_epsilon": _EPSILONS,
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_used_count": ("num_experts_per_tok", "top_k_experts"),
    "expert_weights_norm": ("norm_topk_prob",),
}
"""Attributes of transformers' configurations for each setting; families declare different ones."""

_NEUTRAL: dict[str, tuple[float, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.head_count": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.factor": (0, 1),
    "router_logit_softcapping": (0,),
    "ssm.dt_b_c_rms": (False,),
    "ssm.group_count": (0, 1),
    "swin_norm": (False,),
}
"""Values with which a setting has no effect in llama.cpp; 0 stands for "not set"."""

_SOFTMAX, _SIGMOID = (0, 1), 2
"""llama.cpp's numbers for routing functions; transformers' MiniMax-M2 always uses the sigmoid."""
_DEFAULT_BASE = 10_000.0
"""llama.cpp's default base of rotary embeddings."""
_CLOSE = 1e-5
"""Relative tolerance: files store numbers in fp32, and frequencies are powers of them in fp32."""


def require_same_settings(path: Path, header: GgufHeader, model: Any) -> None:
    """Refuse a model that does not follow the settings of its GGUF file.

    Args:
        path: The file, for the message.
        header: Its header.
        model: transformers' model of the file.

    Raises:
        DataError: A setting that affects logits differs in the model, is ignored by transformers, or is unknown.
    """
    for name, value in _settings(header, model):
        if not _agrees(name, value, header, model):
            raise DataError(
                f"{path} has {_shown(header, name, value)}, but transformers' {type(model).__name__} does not use "
                "it when loaded from a GGUF file; give the model's safetensors folder instead."
            )
    _require_query_scale(path, header, model)


def _shown(header: GgufHeader, name: str, value: Any) -> str:
    key = f"{header.architecture}.{name}"
    if key not in header.settings:
        return f"no {key}, which means {value}"
    return f"{key} {'of several values' if value is None else repr(value)}"


def _settings(header: GgufHeader, model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the architecture's settings that may affect logits, with defaults for missing ones."""
    prefix = f"{header.architecture}."
    own = {name.removeprefix(prefix): value for name, value in header.settings.items() if name.startswith(prefix)}
    if not _is_scaled(header):
        unused = ("finetuned", "original_context_length", "type")
        names = unused if header.setting("rope.scaling.type") is None else (*unused, "factor", "attn_factor")
        own = {name: value for name, value in own.items() if name.removeprefix("rope.scaling.") not in names}
    if [*_frequencies(model, is_sliding=False)]:
        own.setdefault("rope.freq_base", _DEFAULT_BASE)
    if header.architecture != "gemma2":  # llama.cpp has its window built in
        own.setdefault("attention.sliding_window", 0)
    yield from ((name, value) for name, value in own.items() if name not in _SHAPES | _NO_EFFECT)


def _is_scaled(header: GgufHeader) -> bool:
    return header.setting("rope.scaling.type") not in (None, "none")


def _agrees(name: str, value: Any, header: GgufHeader, model: Any) -> bool:
    """Return True if the model uses a setting of its file."""
    config = model.config.get_text_config()
    if name.startswith("rope.scaling.") and _is_scaled(header):
        return _scaling_agrees(name.removeprefix("rope.scaling."), value, config)
    if not isinstance(value, int | float):
        return False
    if name.removesuffix("_swa") in ("rope.freq_base", "rope.dimension_count"):
        return _positions_agree(name, value, header, model)
    return _RULES.get(name, partial(_config_agrees, name))(value, config)


def _config_agrees(name: str, value: float, config: Any) -> bool:
    declared = _declared(config, name)
    if declared is None:
        return value in _NEUTRAL.get(name, ())
    return math.isclose(value, declared, rel_tol=_CLOSE)


def _declared(config: Any, name: str) -> Any:
    """Return the configuration's value of a setting; None if its family does not declare it."""
    known = {*dir(type(config)), *config.attribute_map}  # a reader may add attributes that no module uses
    return next((getattr(config, attribute) for attribute in _CONFIG.get(name, ()) if attribute in known), None)


def _frequencies(model: Any, *, is_sliding: bool) -> Iterator[Tensor]:
    """Yield the rotary frequencies of the layers with, or without, a sliding window."""
    for name, buffer in model.named_buffers():
        kind = name.rsplit(".", 1)[-1]
        if kind.endswith("inv_freq") and "original" not in kind and kind.startswith("sliding") == is_sliding:
            yield buffer.float()


def _positions_agree(name: str, value: Any, header: GgufHeader, model: Any) -> bool:
    frequencies = [*_frequencies(model, is_sliding=name.endswith("_swa"))]
    if "dimension_count" in name:
        return bool(frequencies) and all(2 * len(tensor) == value for tensor in frequencies)
    if _is_scaled(header):  # frequencies are scaled; the base is in the config
        parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        return math.isclose(value, parameters.get("rope_theta", 0), rel_tol=_CLOSE)
    return bool(frequencies) and all(_is_geometric(tensor, value) for tensor in frequencies)


def _is_geometric(frequencies: Tensor, base: float) -> bool:
    exponents = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    return torch.allclose(frequencies.double().cpu(), float(base) ** -exponents, rtol=_CLOSE, atol=0)


def _scaling_agrees(name: str, value: Any, config: Any) -> bool:
    """Return True if position scaling matches the file; `name` is a key's part after "rope.scaling."."""
    parameters = getattr(config, "rope_parameters", None) or {}
    known = {"type": "rope_type", "attn_factor": "attention_factor"}
    known["original_context_length"] = "original_max_position_embeddings"
    expected = parameters.get(known.get(name, name.removeprefix("yarn_")))
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return math.isclose(value, expected, rel_tol=_CLOSE)
    return name == "finetuned" or (value is not None and value == expected)


def _window_agrees(window: float, config: Any) -> bool:
    if _declared(config, "attention.sliding_window"):
        return _config_agrees("attention.sliding_window", window, config)
    return window == 0 or window >= getattr(config, "max_position_embeddings", math.inf)


def _pattern_agrees(period: float, config: Any) -> bool:
    """Return True if only the last of every `period` layers attends to all positions."""
    kinds = getattr(config, "layer_types", None)
    if period < 1 or kinds is None:
        return False
    return [kind == "sliding_attention" for kind in kinds] == [n % period < period - 1 for n in range(len(kinds))]


def _scale_agrees(scale: float, config: Any) -> bool:
    return scale == 0 or math.isclose(scale, _query_scale(config) ** -0.5, rel_tol=_CLOSE)


def _gating_agrees(function: float, config: Any) -> bool:
    return function == _SIGMOID if config.model_type == "minimax_m2" else function in _SOFTMAX


_RULES: dict[str, Callable[[float, Any], bool]] = {
    "attention.scale": _scale_agrees,
    "attention.sliding_window": _window_agrees,
    "attention.sliding_window_pattern": _pattern_agrees,
    "expert_gating_func": _gating_agrees,
}


def _query_scale(config: Any) -> float:
    """Return the square of the number that attention scores are divided by."""
    head = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    return getattr(config, "query_pre_attn_scalar", None) or head


def _require_query_scale(path: Path, header: GgufHeader, model: Any) -> None:
    """Refuse files such as Gemma 27B's that state no attention scale: transformers applies that of smaller models."""
    config = model.config.get_text_config()
    scalar, head = getattr(config, "query_pre_attn_scalar", None), getattr(config, "head_dim", None)
    if scalar != (head if scalar else None) and header.setting("attention.scale") is None:
        raise DataError(
            f"{path} has {header.architecture}.attention.key_length {head} and no attention.scale, but transformers' "
            f"{type(model).__name__} uses query_pre_attn_scalar {scalar} for it; give the model's safetensors folder "
            "instead."
        )


def require_all_weights_loaded(path: Path, header: GgufHeader, model: Any) -> None:
    """Refuse a model without all tensors of its GGUF file: transformers ignores those it does not know.

    Examples are Llama 3's rope_freqs and attention biases.

    Args:
        path: The file, for the message.
        header: Its header.
        model: transformers' model of the file.

    Raises:
        DataError: The number of weights differs between the file and the model.
    """
    loaded = sum(parameter.numel() for parameter in model.parameters())
    stored = header.num_elements
    if model.config.get_text_config().tie_word_embeddings:
        stored -= header.tensors.get("output.weight", 0)  # a copy of the embedding
    if stored != loaded:
        scales = [name for name in header.tensors if name.startswith("rope_")]
        extra = f" and ignores {scales[0]}, which scales positions" if scales else ""
        raise DataError(
            f"{path} has {stored:,} weights, but transformers' {type(model).__name__} loads {loaded:,} of "
            f"them{extra}; give the model's safetensors folder instead."
        )
