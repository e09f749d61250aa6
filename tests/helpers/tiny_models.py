"""Random models of several families, small enough to create in every test."""

import json

import torch

VOCAB = 61
TINY = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = TINY | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2 = TINY | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
# name: model type, settings, whether the head is linear
MODELS = {
    "gpt2": ("gpt2", GPT2, True),
    "llama": ("llama", LLAMA | {"tie_word_embeddings": False}, True),
    "phi with a head bias": ("phi", LLAMA | {"num_key_value_heads": 4}, True),
    "gptj with a head bias": ("gptj", GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}, True),
    "qwen2": ("qwen2", LLAMA, True),
    "qwen3": ("qwen3", LLAMA, True),
    "gpt-neox": ("gpt_neox", LLAMA, True),
    "gemma2 with capped logits": ("gemma2", LLAMA | {"query_pre_attn_scalar": 8}, False),
    "mistral with a sliding window": ("mistral", LLAMA | {"sliding_window": 3}, True),
    "bloom": ("bloom", TINY | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, True),
    "granite with scaled logits": ("granite", LLAMA | {"logits_scaling": 4.0}, False),
}


def make_config(model_type, settings):
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **settings)


def make_model(name="gpt2", **changes):
    from transformers import AutoModelForCausalLM

    model_type, settings, _ = MODELS[name]
    torch.manual_seed(0)
    config = make_config(model_type, settings | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, and large enough that a softcap is felt
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def logits_of(model, input_ids):
    with torch.no_grad():
        return model.eval()(input_ids=input_ids).logits


def change_tensors(folder, change):
    """Rewrite a folder's weights after `change` has edited the dictionary of them."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def overflow(row):
    """Fill a row of an embedding with finite numbers whose sums are not."""
    row[::2], row[1::2] = 3e38, -3e38


def edit_json(path, **values):
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
