"""Trials refuse non-causal and batch-dependent models before training or scoring, and no others."""

import json

import pytest
import torch
from families_models import tiny_config, tiny_model
from tiny_models import LLAMA, make_config, make_model
from torch import nn
from transformers import AutoModelForCausalLM

from megaft.base.errors import ConfigError, DataError
from megaft.commands.generate.command import load_cached_model
from megaft.models import trials
from megaft.run.model import nats_model
from megaft.scoring.model import load_scoring_model
from megaft.weights.loading import pretrained
from megaft.weights.loading.trial_model import create_trial_model

CPU = torch.device("cpu")
GEMMA3 = {"layer_types": ["sliding_attention", "full_attention"]}
CAUSAL = [
    pytest.param("gpt2", {}, id="gpt2"),
    pytest.param("bert", {"is_decoder": True}, id="bert as a decoder"),
    pytest.param("gemma3_text", GEMMA3, id="gemma3"),
    pytest.param("mistral", {"sliding_window": 3}, id="a window of three tokens"),
    pytest.param("llama4_text", {"attention_chunk_size": 8}, id="chunks of eight tokens"),
    pytest.param("mamba", {}, id="mamba"),
    pytest.param("deepseek_v4", {}, id="deepseek v4"),
    pytest.param("mixtral", {}, id="experts"),
    pytest.param("bloom", {}, id="bloom"),
]
LOOKS_AHEAD = [
    pytest.param("bert", {"is_decoder": False}, "is_decoder to true", id="bert as an encoder"),
    pytest.param("electra", {"is_decoder": False}, "is_decoder to true", id="electra"),
    pytest.param("roberta", {"is_decoder": False}, "is_decoder to true", id="roberta"),
    pytest.param("big_bird", {"is_decoder": False}, "is_decoder to true", id="big bird"),
    pytest.param(
        "gemma3_text", GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention", id="gemma3"
    ),
    pytest.param("xlm", {"causal": False}, "causal to true", id="xlm"),
]


def new_model(model_type, changes):
    """A model with the small weights of a new initialization."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type, changes))


def test_partitioned_models_are_tested_on_the_host(monkeypatch):
    model = new_model("llama", {}).to("meta")  # as under ZeRO-3 on a GPU: no values, and on another device
    monkeypatch.setattr(trials, "is_partitioned", lambda _: True)
    trials.require_language_model(model)
    trials.require_document_isolation(model)
    assert trials.head_is_linear(model)


def test_the_output_layer_of_half_precision_is_tested_on_the_trial_model(monkeypatch):
    """The model itself in float32 would take twice its memory."""
    model = new_model("llama", {}).bfloat16()
    monkeypatch.setattr(model, "forward", None)
    assert trials.head_is_linear(model)


# Causality


@pytest.mark.slow
@pytest.mark.parametrize("make", [new_model, lambda name, changes: tiny_model(tiny_config(name, changes))])
@pytest.mark.parametrize(("model_type", "changes"), CAUSAL)
def test_causal_models_are_taken(model_type, changes, make):
    trials.require_language_model(make(model_type, changes))


@pytest.mark.parametrize(("model_type", "changes", "way_out"), LOOKS_AHEAD)
def test_models_that_look_ahead_are_refused(model_type, changes, way_out):
    with pytest.raises(DataError, match=rf"\(model_type {model_type}\) .*later tokens.*{way_out}") as error:
        trials.require_language_model(new_model(model_type, changes))
    assert "\n" not in str(error.value)


def test_weights_of_zero_hide_nothing():
    """Zero-initialized projections, as in some recipes, hide any influence until they are trained."""
    model = new_model("bert", {"is_decoder": False})
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(DataError, match="later tokens"):
        trials.require_language_model(model)


def test_a_window_wider_than_the_trial_is_made_short():
    """Its window of 512 tokens would hide the influence of tokens beyond it."""
    trial_model = create_trial_model(new_model("gemma3_text", GEMMA3 | {"sliding_window": 512}))
    assert trial_model.config.sliding_window == 16
    assert trials.trial_length(trial_model) > 2 * 8


@pytest.mark.parametrize(("num_layers", "is_made"), [(2, True), (40, False)])
def test_a_trial_model_of_all_layers_is_small(monkeypatch, num_layers, is_made):
    """A layer of the trial model has about 5 million parameters, with feed-forward width reduced to 256."""

    def fail(text):
        raise ValueError("this configuration cannot be cut.")

    config = make_config("llama", LLAMA | {"hidden_size": 1024, "num_hidden_layers": num_layers, "head_dim": 256})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr("megaft.weights.loading.trial_model._with_few_layers", fail)
    assert (create_trial_model(model) is not None) is is_made


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_trial_model_reads_no_setting_that_transformers_warns_of(name, monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers.configuration_utils.logger.warning_once", warnings.append)
    assert create_trial_model(make_model(name)) is not None
    assert warnings == []


def test_evaluation_refuses_them(tmp_path):
    new_model("bert", {"is_decoder": False}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"BertLMHeadModel .*later tokens"):
        load_scoring_model(str(tmp_path), dtype=torch.bfloat16, device=CPU)


# Rows


class Mixing(nn.Module):
    """A GPT-2 whose logits depend on the mean of its batch, as with batch norm or experts of bounded capacity."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits + 0.1 * output.logits.mean(0, keepdim=True)
        return output


def test_rows_that_depend_on_each_other_are_seen(monkeypatch):
    model = make_model("gpt2").eval()
    assert trials.is_batch_invariant(model)
    assert trials.is_causal(Mixing(model))
    assert not trials.is_batch_invariant(Mixing(model))
    monkeypatch.setattr(trials, "create_trial_model", lambda model: None)  # try the model itself
    with pytest.raises(DataError, match=r"micro-batch size"):
        trials.require_language_model(Mixing(model))


class Ruling(Mixing):
    """The same GPT-2, ruling out a token with the lowest number or -inf."""

    def __init__(self, model, lowest):
        super().__init__(model)
        self.lowest = lowest

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits[..., 3] = self.lowest
        return output


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -torch.inf])
def test_a_token_that_the_model_rules_out_hides_nothing(lowest):
    model = Ruling(make_model("gpt2").eval(), lowest)
    assert trials.is_causal(model)
    assert not trials.is_batch_invariant(model)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_influence(monkeypatch, dtype):
    """Without a trial model the model itself is tested in float32: half precision rounds as much as an influence."""
    monkeypatch.setattr(trials, "create_trial_model", lambda model: None)
    model = tiny_model(tiny_config("llama", {})).to(dtype)
    assert not trials.is_causal(model)  # by its own rounding
    model.lm_head.float()  # as transformers keeps some layers
    before = {name: values.clone() for name, values in model.state_dict().items()}
    trials.require_language_model(model)
    trials.require_document_isolation(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # values and dtypes
    with pytest.raises(DataError, match="later tokens"):
        trials.require_language_model(tiny_model(tiny_config("xlm", {"causal": False})).to(dtype))


# One trial model for all trials of a run


@pytest.fixture
def made(monkeypatch):
    """Models for which a trial model was created."""
    made = []
    monkeypatch.setattr(trials, "create_trial_model", lambda model: made.append(model) or create_trial_model(model))
    return made


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_training_makes_one_trial_model(made, monkeypatch, is_partitioned):
    monkeypatch.setattr(trials, "is_partitioned", lambda _: is_partitioned)
    assert nats_model(make_model("gpt2"), True).head is not None
    assert len(made) == 1


def test_generation_makes_one_trial_model(made, tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    assert load_cached_model(str(tmp_path), torch.float32).cache_name == "past_key_values"
    assert len(made) == 1


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma2 with capped logits"])
def test_scoring_makes_one_trial_model(made, name, tmp_path):
    """With a pruned last layer, with a linear head found by a trial, and with neither."""
    make_model(name).save_pretrained(tmp_path)
    scorer = load_scoring_model(str(tmp_path), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert (scorer.head.weight is None) == ("capped" in name)
    assert scorer.head.weight is None or scorer.head.weight.dtype is torch.bfloat16
    assert len(made) == 1


def test_generation_refuses_a_model_before_it_is_moved_to_the_gpu(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, *_: moved.append(self) or self)
    new_model("bert", {"is_decoder": False}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="later tokens"):
        load_cached_model(str(tmp_path), torch.float32)
    assert moved == []
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    load_cached_model(str(tmp_path / "gpt2"), torch.float32)
    assert len(moved) == 1


# Documents


@pytest.mark.parametrize("model_type", ["deepseek_v4", "bloom", "mamba", "opt", "recurrent_gemma"])
def test_documents_that_influence_each_other_are_refused(model_type):
    with pytest.raises(ConfigError, match=r"^--data\.attend-within-documents .*across documents"):
        trials.require_document_isolation(new_model(model_type, {}))


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "llama4_text", "gemma3_text", "mistral", "mixtral", "phi3"])
def test_documents_that_do_not_are_taken(model_type):
    trials.require_document_isolation(new_model(model_type, {}))


# A trial leaves no trace


@pytest.mark.parametrize("was_training", [True, False])
def test_a_trial_leaves_no_trace(was_training):
    model = make_model(attn_pdrop=0.5).train(was_training)
    state = torch.get_rng_state()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    trials.require_language_model(model)
    trials.require_document_isolation(model)
    assert model.training is was_training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert (model.config.vocab_size, model.config.n_layer) == (61, 2)


# Values in config.json that make no model


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"pad_token_id": 10**6}, id="padding beyond the vocabulary"),
        pytest.param({"pad_token_id": -500}, id="padding far below zero"),
        pytest.param({"num_attention_heads": 0}, id="no heads"),
        pytest.param({"num_attention_heads": -4}, id="negative heads"),
        pytest.param({"num_attention_heads": "four"}, id="heads in words"),
        pytest.param({"num_key_value_heads": 3}, id="heads not divisible by those of keys"),
        pytest.param({"hidden_size": 0}, id="no width"),
        pytest.param({"hidden_size": -32}, id="negative width"),
        pytest.param({"hidden_size": 32.5}, id="a fraction as width"),
        pytest.param({"hidden_size": None}, id="null as width"),
        pytest.param({"hidden_size": 10**15}, id="a width beyond memory"),
        pytest.param({"vocab_size": 0}, id="no vocabulary"),
        pytest.param({"vocab_size": -1}, id="negative vocabulary"),
        pytest.param({"num_hidden_layers": "2"}, id="layers in quotes"),
        pytest.param({"num_hidden_layers": -1}, id="negative layers"),
        pytest.param({"hidden_act": "no-such-activation"}, id="unknown activation"),
        pytest.param({"rope_parameters": {"rope_type": "no-such-type", "rope_theta": 1e4}}, id="unknown positions"),
        pytest.param({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, id="positions without factors"),
        pytest.param({"rope_parameters": 7}, id="positions that are a number"),
        pytest.param({"model_type": "gpt2", "max_position_embeddings": 0}, id="no positions"),
        pytest.param({"head_dim": 0}, id="heads of no width"),
        pytest.param({"head_dim": 7}, id="odd heads"),
        pytest.param({"initializer_range": "x"}, id="initializer in words"),
        pytest.param({"attention_dropout": "x"}, id="dropout in words"),
        pytest.param({"rms_norm_eps": "x"}, id="epsilon in words"),
        pytest.param({"model_type": 7}, id="model_type that is a number"),
        pytest.param({"model_type": None}, id="model_type null"),
        pytest.param({"model_type": "t5"}, id="encoder and decoder"),
        pytest.param({"model_type": "clip"}, id="images"),
    ],
)
def test_values_that_make_no_model_are_refused(change, tmp_path):
    config = make_config("llama", LLAMA).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError) as error:
        trials.require_language_model(pretrained.create_language_model(str(tmp_path / "config.json"), 0))
    assert "\n" not in str(error.value)
