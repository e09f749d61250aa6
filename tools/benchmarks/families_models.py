"""Tiny random models of every causal family that transformers knows, their configurations derived from its defaults."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megaft.models.stand_in import make_loud

WORDS, LAYERS, WIDTH, HEADS = 96, 2, 32, 4

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
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "sep_token_id": 1,
    "rope_scaling": None,
    "sliding_window": 7,
    "attention_chunk_size": 8,
    "query_pre_attn_scalar": 8,
    "vocab_size_per_layer_input": WORDS,
    "hidden_size_per_layer_input": 8,
    "original_max_position_embeddings": 256,
    "is_decoder": True,
}
"""What a tiny model has where its configuration has a setting of that name."""


ODD: dict[str, dict[str, Any]] = {}
"""What single families need besides."""


def model_types() -> list[str]:
    """Return the model types of all configurations that AutoModelForCausalLM takes."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a small configuration of a model type."""
    config_class = CONFIG_MAPPING[model_type]
    odd = ODD.get(model_type, {}) | changes
    return config_class(**_small(config_class) | odd)


def tiny_model(config: Any, seed: int = 0) -> Any:
    """Return a random model of a configuration, whose weights are large enough that every part of it is felt."""
    torch.manual_seed(seed)
    return make_loud(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def _small(config_class: Any) -> dict[str, Any]:
    defaults = config_class()
    settings = {name: value for name, value in SMALL.items() if hasattr(defaults, name)}
    for name in getattr(config_class, "sub_configs", {}):
        sub = getattr(defaults, name, None)
        if sub is not None:
            settings[name] = _small(type(sub)) | {"model_type": sub.model_type}
    names = set(getattr(config_class, "attribute_map", {}))
    return {name: value for name, value in settings.items() if name not in names or not hasattr(defaults, name)} | {
        name: value for name, value in settings.items() if name in names
    }
