"""GGUF file of a tiny Llama with the toy's tokenizer, and the same model in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import toy

HEADS, KEY_HEADS = 4, 2
CONFIG = {
    "vocab_size": toy.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def make_llama() -> Any:
    """Return the transformers model with the file's weights, always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def make_gguf(path: Path, model: Any = None, **settings: Any) -> None:
    """Write a model in fp32 and the toy's tokenizer in the format of llama.cpp's converter.

    Args:
        path: The file.
        model: By default the one of make_llama.
        settings: Additional or replaced settings of the file; numbers are written as uint32.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, value in (_sizes() | settings).items():
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_uint32(name, value)
    _add_tokenizer(writer, path)
    for name, tensor in (model or make_llama()).state_dict().items():
        writer.add_tensor(gguf_name(name), _permuted(name, tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name for a parameter of transformers' Llama."""
    *layer, module = (
        name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if (name.startswith("model.layers."))
        else [name.removesuffix(".weight")]
    )
    return ".".join([*(["blk", *layer] if layer else []), NAMES[module], "weight"])


def _sizes() -> dict[str, Any]:
    return {
        "llama.block_count": CONFIG["num_hidden_layers"],
        "llama.context_length": CONFIG["max_position_embeddings"],
        "llama.embedding_length": CONFIG["hidden_size"],
        "llama.feed_forward_length": CONFIG["intermediate_size"],
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KEY_HEADS,
        "llama.attention.layer_norm_rms_epsilon": CONFIG["rms_norm_eps"],
        "llama.rope.freq_base": CONFIG["rope_theta"],
        "llama.rope.dimension_count": CONFIG["hidden_size"] // HEADS,
        "llama.vocab_size": CONFIG["vocab_size"],
    }


def _permuted(name: str, weight: Any) -> Any:
    """Permute query or key weights to llama.cpp's rotary layout, with the two rows of each rotation adjacent."""
    heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else 0
    if not heads:
        return weight
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape).copy()


def _add_tokenizer(writer: Any, path: Path) -> None:
    folder = path.with_suffix(".tokenizer")
    toy.make_tokenizer(folder, toy.text()[:20_000])
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    for file in (*folder.iterdir(), folder):
        file.unlink() if file.is_file() else file.rmdir()
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
