"""GGUF settings compared with transformers' models: ignored settings are refused."""

from pathlib import Path

import pytest
import torch
from tiny_models import GPT2, LLAMA, make_config
from transformers import AutoModelForCausalLM

from megaft.base.errors import DataError
from megaft.base.gguf import GgufHeader
from megaft.weights.loading.gguf_settings import require_same_settings

PATH = Path("model.gguf")
ROTARY = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LOCAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
}
GEMMA = LLAMA | {"query_pre_attn_scalar": 8, "sliding_window": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e6}
MOE = ROTARY | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
# name: model type, settings, its GGUF architecture, what the file says of it
MODELS = {
    "llama": ("llama", ROTARY, "llama", {"rope.freq_base": 1e6}),
    "mistral": ("mistral", ROTARY | {"sliding_window": None}, "llama", {"rope.freq_base": 1e6}),
    "windowed mistral": ("mistral", ROTARY | {"sliding_window": 8}, "llama", {"rope.freq_base": 1e6}),
    "scaled llama": (
        "llama",
        LLAMA | {"rope_parameters": YARN},
        "llama",
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.finetuned": True,
        },
    ),
    "phi3": ("phi3", LLAMA, "phi3", {"rope.dimension_count": 8}),
    "stablelm": ("stablelm", LLAMA, "stablelm", {"rope.dimension_count": 2, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", LLAMA, "starcoder2", {"attention.layer_norm_epsilon": 1e-5}),
    "qwen3 moe": ("qwen3_moe", MOE, "qwen3moe", {"rope.freq_base": 1e6, "expert_used_count": 2}),
    "gemma2": (
        "gemma2",
        GEMMA,
        "gemma2",
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 16},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"rope_parameters": LOCAL, "num_hidden_layers": 6},
        "gemma3",
        {"attention.sliding_window": 16, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
    ),
    "gpt2": ("gpt2", GPT2, "gpt2", {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5}),
    "mamba": (
        "mamba",
        {"vocab_size": 61, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
        "mamba",
        {"attention.head_count": 0, "attention.layer_norm_rms_epsilon": 1e-5, "ssm.state_size": 4},
    ),
}


def check(name, changes=None, absent=()):
    """Check a model against its file's settings, stored in fp32, with some changed or removed."""
    model_type, settings, architecture, own = MODELS[name]
    own = {key: value for key, value in (own | (changes or {})).items() if key not in absent}
    stored = {key: torch.tensor(value).item() if isinstance(value, float) else value for key, value in own.items()}
    header = GgufHeader(architecture, {f"{architecture}.{key}": value for key, value in stored.items()}, {})
    require_same_settings(PATH, header, AutoModelForCausalLM.from_config(make_config(model_type, settings)))


@pytest.mark.parametrize("name", [name for name in MODELS if name != "windowed mistral"])
def test_the_settings_of_the_model_pass(name):
    check(name)


NEUTRAL = {
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 0.0,
    "attention.scale": 8**-0.5,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "router_logit_softcapping": 0.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.original_context_length": 32,
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.sliding_window": 64,
    "context_length": 10**6,
    "tensor_data_layout": "Meta AI original pth",
}


@pytest.mark.parametrize(("key", "value"), NEUTRAL.items(), ids=list(NEUTRAL))
def test_a_setting_that_changes_nothing_passes(key, value):
    check("llama", {key: value})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        pytest.param("llama", "logit_scale", 0.0625, id="logit scale"),
        pytest.param("llama", "embedding_scale", 12.0, id="embedding scale"),
        pytest.param("llama", "residual_scale", 0.22, id="residual scale"),
        pytest.param("llama", "attention.scale", 0.0078125, id="attention scale"),
        pytest.param("llama", "attn_logit_softcapping", 50.0, id="attention cap"),
        pytest.param("llama", "final_logit_softcapping", 30.0, id="logit cap"),
        pytest.param("gemma2", "final_logit_softcapping", 20.0, id="another logit cap"),
        pytest.param("gemma2", "attn_logit_softcapping", 0.0, id="no attention cap"),
        pytest.param("llama", "attention.head_count", 8, id="heads"),
        pytest.param("starcoder2", "attention.layer_norm_epsilon", 1e-6, id="epsilon that transformers does not read"),
        pytest.param("llama", "rope.freq_base", 5e5, id="base"),
        pytest.param("starcoder2", "rope.freq_base", 999999.4420358813, id="base that transformers does not read"),
        pytest.param("gemma3", "rope.freq_base_swa", 1e6, id="base of windowed layers"),
        pytest.param("phi3", "rope.dimension_count", 6, id="partly rotated heads"),
        pytest.param("stablelm", "rope.dimension_count", 4, id="other partly rotated heads"),
        pytest.param("llama", "rope.scaling.factor", 4.0, id="linear scaling by its factor alone"),
        pytest.param("llama", "rope.scale_linear", 4.0, id="linear scaling by its old key"),
        pytest.param("llama", "rope.scaling.type", "linear", id="scaling by type"),
        pytest.param("scaled llama", "rope.scaling.factor", 2.0, id="another factor"),
        pytest.param("scaled llama", "rope.scaling.original_context_length", 32, id="another first length"),
        pytest.param("scaled llama", "rope.scaling.yarn_beta_fast", 16.0, id="another ramp"),
        pytest.param("scaled llama", "rope.freq_base", 1e4, id="another base of scaled positions"),
        pytest.param("gpt2", "rope.scaling.type", "linear", id="scaling without rotary positions"),
        pytest.param("gpt2", "rope.freq_base", 1e4, id="base without rotary positions"),
        pytest.param("mamba", "attention.scale", 0.5, id="attention scale without attention"),
        pytest.param("llama", "rope.freq_base", 2**64 - 1, id="any number"),
        pytest.param("phi3", "attention.sliding_window", 16, id="window that transformers does not read"),
        pytest.param("gemma2", "attention.sliding_window", 32, id="another window"),
        pytest.param("gemma3", "attention.sliding_window_pattern", 3, id="windows in other layers"),
        pytest.param("gemma3", "attention.sliding_window_pattern", None, id="windows by layer"),
        pytest.param("qwen3 moe", "expert_used_count", 3, id="experts of a token"),
        pytest.param("qwen3 moe", "expert_weights_scale", 2.5, id="scale of experts"),
        pytest.param("qwen3 moe", "expert_gating_func", 2, id="sigmoid routing"),
        pytest.param("qwen3 moe", "expert_weights_norm", False, id="weights of experts not normalized"),
        pytest.param("mamba", "ssm.dt_b_c_rms", True, id="norms of Falcon-Mamba"),
        pytest.param("llama", "attention.causal", False, id="encoder"),
        pytest.param("llama", "swiglu_clamp_exp", None, id="one for each layer"),
        pytest.param("llama", "some.future_scale", 1.0, id="unknown"),
    ],
)
def test_a_setting_of_another_model_is_refused_by_name(name, key, value):
    architecture = MODELS[name][2]
    with pytest.raises(DataError, match=rf"^model\.gguf has {architecture}\.{key.replace('.', '[.]')} .*safetensors"):
        check(name, {key: value})


@pytest.mark.parametrize(
    ("name", "absent", "says"),
    [
        pytest.param("llama", "rope.freq_base", r"no llama\.rope\.freq_base, which means 10000\.0", id="base"),
        pytest.param("windowed mistral", "", r"no llama\.attention\.sliding_window, which means 0", id="window"),
    ],
)
def test_a_default_of_another_model_is_refused_by_name(name, absent, says):
    with pytest.raises(DataError, match=says):
        check(name, absent=(absent,))


def test_scaling_that_is_turned_off_has_no_factor():
    check("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 8.0})


def test_a_pattern_of_windows_passes():
    check("gemma3", {"attention.sliding_window_pattern": 6})


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_gemma_27b_whose_attention_scale_transformers_does_not_know_is_refused(name, monkeypatch):
    model_type, settings, *rest = MODELS[name]
    monkeypatch.setitem(MODELS, name, (model_type, settings | {"query_pre_attn_scalar": 256}, *rest))
    with pytest.raises(DataError, match=rf"{name}\.attention\.key_length 8 .* query_pre_attn_scalar 256"):
        check(name)
