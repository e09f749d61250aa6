"""NaN or infinite stored weights: refused with file, tensor and count wherever a model is loaded."""

import math
import re
import shutil

import pytest
import torch
from families_models import tiny_config, tiny_model
from tiny_models import change_tensors, make_model

from megaft.base import parallel
from megaft.base.errors import DataError, NumericsError
from megaft.commands.generate.command import load_cached_model
from megaft.commands.validate import validate
from megaft.config.train import ModelConfig
from megaft.models.generation import exact_cache
from megaft.models.trials import require_language_model
from megaft.scoring.model import load_scoring_model
from megaft.weights.loading.finite_weights import is_finite, require_finite, require_finite_weights
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.reading import open_weights

PICKLE = "pytorch_model.bin"
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
UP = "model.layers.1.mlp.up_proj.weight"
CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("at", [(0, 0), (2, 3), (4, 6)])
def test_a_single_value_is_found_and_counted(value, dtype, at):
    tensor = torch.ones(5, 7, dtype=dtype)
    assert require_finite("w", tensor) is tensor
    tensor[at] = value
    assert not is_finite(tensor)
    with pytest.raises(DataError, match=rf"w has 1 of 35 .* at \[{at[0]}, {at[1]}\]"):
        require_finite("w", tensor)


@pytest.mark.parametrize("tensor", [torch.ones(0, 3), torch.tensor(2.0), torch.arange(3), torch.full((2,), 3.4e38)])
def test_finite_tensors_of_any_shape_pass(tensor):
    assert is_finite(tensor)


def test_no_precision_is_advised_that_the_model_has():
    """For a model whose files are not read again, from the hub or a GGUF file."""
    for dtype, advice in ((torch.float32, "the model is damaged"), (torch.bfloat16, "use float32")):
        weights = {"w": torch.tensor([1.0, math.nan], dtype=dtype)}
        with pytest.raises(DataError, match=f"^--model is some/name; .*w has 1 of 2 values .*; {advice}"):
            require_finite_weights("--model is some/name", "some/name", weights.items())


# Every way to load a model


def from_megatron(folder):
    from megaft.models import megatron

    parallel.join(parallel.discover({}))
    try:
        parallel.start_tensor_parallelism(1)
        megatron.build(ModelConfig(path=folder, backend="megatron"), seed=0)
    finally:
        parallel.leave()


LOADERS = {  # name: the setting that the message names, and what loads a folder
    "training": ("--model.path", load_language_model),
    "training in half precision": ("--model.path", lambda folder: load_language_model(folder, torch.bfloat16)),
    "evaluation": ("--model", lambda folder: load_scoring_model(folder, dtype=torch.float32, device=CPU)),
    "generation": ("--model", lambda folder: load_cached_model(folder, torch.float32)),
}


@pytest.fixture
def damaged(tmp_path):
    """A Llama with two values that are not finite in one tensor of its file, and one in another."""
    make_model("llama").save_pretrained(tmp_path)

    def harm(tensors):
        tensors[UP][[2, 7], 3] = torch.tensor([math.nan, -math.inf])
        tensors["model.norm.weight"][1] = math.inf

    change_tensors(tmp_path, harm)
    return str(tmp_path)


@pytest.mark.parametrize(("setting", "load"), LOADERS.values(), ids=LOADERS)
def test_a_damaged_model_is_named_however_it_is_loaded(damaged, setting, load, capsys):
    with pytest.raises(DataError) as refused:
        load(damaged)
    assert str(refused.value) == (
        f"{setting} is {damaged}; in model.safetensors {UP} has 2 of 1,536 values that are not finite, the first at "
        "[2, 3] (2 tensors have such values); the model is damaged. Copy it again, or use an earlier checkpoint."
    )
    assert "cache" not in capsys.readouterr().err


@pytest.mark.slow
def test_megatron_core_gets_no_damaged_weight(damaged, run_ranks):
    assert run_ranks(1, _message_of, damaged)[0].startswith(f"--model.path is {damaged}; {UP} has 2 of 1,536 values")


def _message_of(folder):
    with pytest.raises(DataError) as refused:
        from_megatron(folder)
    return str(refused.value)


def test_a_nan_in_tied_weights_is_not_taken_for_two_weights(tmp_path):
    """NaN does not equal itself, so the two stored copies of the embedding seem to differ."""
    make_model("gpt2").save_pretrained(tmp_path)

    def harm(tensors):
        tensors["transformer.wte.weight"][5, 6] = math.nan
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    change_tensors(tmp_path, harm)
    for load in (load_language_model, open_weights):
        with pytest.raises(DataError, match=r"has 1 of 1,952 .* at \[5, 6\]"):
            load(str(tmp_path))


def test_buffers_that_files_hold_are_looked_at_too(tmp_path):
    """A NaN in the bias of DeepSeek-V3's router selects other experts, and all logits stay finite."""
    tiny_model(tiny_config("deepseek_v3", {"first_k_dense_replace": 1})).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors[ROUTER_BIAS][1].fill_(math.nan))
    with pytest.raises(DataError, match=rf"in model\.safetensors {re.escape(ROUTER_BIAS)} has 1 of \d+ values"):
        load_language_model(str(tmp_path))


def test_a_damaged_pickle_is_not_told_to_use_the_precision_it_was_loaded_in(tmp_path):
    model = make_model("gpt2")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict() | {"transformer.wpe.weight": torch.full((64, 32), math.nan)}, tmp_path / PICKLE)
    with pytest.raises(DataError, match=r"; transformer\.wpe\.weight has 2,048 of .* damaged"):
        load_language_model(str(tmp_path))


def test_a_weight_that_bfloat16_cannot_hold_is_told_from_a_damaged_one(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors["transformer.wpe.weight"][3, 3].fill_(3.4e38))
    load_language_model(str(tmp_path))
    with pytest.raises(DataError, match=r"in bfloat16 transformer\.wpe\.weight has 1 of 2,048 .*; use float32, or"):
        load_language_model(str(tmp_path), torch.bfloat16)


@pytest.mark.parametrize(("stage", "world_size"), [(2, 1), (3, 8)])
def test_validate_refuses_what_training_would(toy_model, toy_texts, tmp_path, run_ranks, stage, world_size):
    from validate_settings import settings_of

    folder = shutil.copytree(toy_model, tmp_path / "model")
    # Rank 0 of 8 holds none of it under ZeRO-3.
    change_tensors(folder, lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"][-1, -1].fill_(math.nan))
    settings = settings_of(folder, toy_texts, tmp_path, stage=stage, world_size=world_size)
    (message,) = run_ranks(1, _refusal_of, settings)
    assert "in model.safetensors transformer.h.1.mlp.c_fc.weight has 1 of 4,096 values that are not finite" in message


def _refusal_of(settings):
    with pytest.raises(DataError) as refused:
        validate(settings)
    return str(refused.value)


# Finite weights whose sums are not


@pytest.fixture
def overflowing():
    """A GPT-2 whose last norm makes logits overflow."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(3e38)
    return model


@pytest.mark.parametrize(
    "trial",
    [
        pytest.param(exact_cache, id="not a cache that is not exact"),
        pytest.param(require_language_model, id="not a model that attends to later tokens"),
    ],
)
def test_logits_that_are_not_finite_are_named_as_such(overflowing, monkeypatch, trial):
    monkeypatch.setattr("megaft.models.trials.create_trial_model", lambda model: None)  # try the model itself
    with pytest.raises(NumericsError, match=r"logits .*not finite"):
        trial(overflowing)
