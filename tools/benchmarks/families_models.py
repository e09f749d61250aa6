"""Tiny random models of every causal family of transformers, with configurations derived from its defaults."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megaft.weights.loading.trial_model import TRIAL_ERRORS, add_noise, num_parameters

WORDS, LAYERS, WIDTH, HEADS, MAX_PARAMETERS = 96, 2, 32, 4, 20_000_000

SMALL = {
    "vocab_size": WORDS,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "d_model": WIDTH,
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "emb_dim": WIDTH,
    "embedding_size": WIDTH,
    "dim": WIDTH,
    "num_hidden_layers": LAYERS,
    "n_layer": LAYERS,
    "n_layers": LAYERS,
    "num_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "num_encoder_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "n_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "num_encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_top_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "sep_token_id": 1,
    "sliding_window": 7,
    "attention_chunk_size": 8,
    "query_pre_attn_scalar": 8,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8,
    "original_max_position_embeddings": 256,
    "is_decoder": True,
}
"""Settings of a tiny model, applied if its configuration has a setting of that name."""


MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
ASSISTANT = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": LAYERS,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}
ODD: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "beam": {"n_group": 2},
    "blt": {
        "encoder_hash_byte_group_vocab": 60,
        "encoder_config": {"hidden_size_global": WIDTH},
        "decoder_config": {"hidden_size_global": WIDTH},
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "codegen": {"rotary_dim": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "moshi": {"audio_vocab_size": 24},
    "dots1": {"moe_intermediate_size": 24, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0]},
    "gemma4_assistant": {"text_config": ASSISTANT | {"model_type": "gemma4_text"}, "backbone_hidden_size": WIDTH},
    "gemma4_unified_assistant": {
        "text_config": ASSISTANT | {"model_type": "gemma4_unified_text"},
        "backbone_hidden_size": WIDTH,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": HEADS, "window_size": 7},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA,
    "kimi_linear": {"linear_attn_config": {"num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"moe_topk": 2, "zero_expert_num": 2, "expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "chunk_size": 16, "ssm_state_size": 8},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "xlm": {"pad_index": 0},
    "xlnet": {"d_inner": 48},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"num_heads": HEADS, "num_blocks": 2, "num_hidden_layers": 2},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "mamba_headdim": 8,
        "mamba_d_state": 8,
        "n_mamba_heads": 8,
        "chunk_size": 16,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "num_query_groups": 4,
        "hybrid_layer_ids": [1],
        "adapter_rank": 4,
    },
    "mpt": {"max_seq_len": 512},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""Further settings of individual families."""


def model_types() -> list[str]:
    """Return the model types of all configurations that AutoModelForCausalLM accepts."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


ENCODERS = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} as an encoder": (name, {"is_decoder": False}) for name in ENCODERS},
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "xlm, causal": ("xlm", {"causal": True}),
}
"""Unusual configurations of a family: model type and changes."""


def tiny_config(model_type: str, changes: dict[str, Any] | None = None) -> Any:
    """Return a small configuration of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    small = _small(config_class)
    for name, value in (ODD.get(model_type, {}) | (changes or {})).items():
        is_inner = isinstance(value, dict) and name in getattr(config_class, "sub_configs", {})
        small[name] = small.get(name, {}) | value if is_inner else value
    return config_class(**small)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Return a random model whose weights are large enough that every module affects the output."""
    if (size := num_parameters(config)) > MAX_PARAMETERS:
        raise OverflowError(f"{size} parameters are not tiny")
    torch.manual_seed(seed)
    return add_noise(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def _small(config_class: Any) -> dict[str, Any]:
    """Return the settings of SMALL that a configuration class has, including its nested configurations."""
    known = _settings_of(config_class)
    small = {name: value for name, value in SMALL.items() if name in known and _can_set(config_class, name)}
    aliases = getattr(config_class, "attribute_map", {})
    small = {name: value for name, value in small.items() if aliases.get(name) not in small}
    heads = [known.get(name) for name in ("num_attention_heads", "num_key_value_heads")]
    if heads[0] == heads[1] is not None:
        small["num_key_value_heads"] = HEADS
    if known.get("per_layer_config"):
        small["per_layer_config"] = {}
    for name, inner in getattr(config_class, "sub_configs", {}).items():
        if isinstance(known.get(name), dict) and (inner_type := _inner_type(known[name], inner)):
            small[name] = _small(inner_type) | {"model_type": inner_type.model_type}
    return small


def _inner_type(settings: dict[str, Any], default: Any) -> Any:
    """Return the class of a nested configuration, if one is named; `default` may be AutoConfig."""
    if settings.get("model_type"):
        return CONFIG_MAPPING[settings["model_type"]]
    return default if hasattr(default, "model_type") else None


def _settings_of(config_class: Any) -> dict[str, Any]:
    """Return the default settings, also under the attribute names that all families share."""
    try:
        known = config_class().to_dict()
    except TRIAL_ERRORS:  # its defaults alone are not a valid configuration
        known = dict.fromkeys(SMALL)
    aliases = getattr(config_class, "attribute_map", {})
    return {alias: known[name] for alias, name in aliases.items() if name in known} | known


def _can_set(config_class: Any, name: str) -> bool:
    found = getattr(config_class, name, None)
    return not isinstance(found, property) or found.fset is not None
