"""Text models of composite models: loaded, tested and exported, though their own config has no causal class."""

import pytest
import torch
from families_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from megaft.base.errors import DataError
from megaft.models import trials
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.loading.text_model import keep_composite_config
from megaft.weights.loading.trial_model import create_trial_model
from megaft.weights.reading import open_weights


@pytest.fixture
def folder(request, tmp_path):
    """The folder of a text model and its composite configuration."""
    config = tiny_config(request.param)
    tiny_model(config).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("folder", ["emu3", "mllama"], indirect=True)
def test_the_text_model_has_a_trial_model(folder):
    model = load_language_model(str(folder))
    assert isinstance(create_trial_model(model), type(model))
    trials.require_language_model(model)


@pytest.mark.parametrize("folder", ["emu3"], indirect=True)
def test_an_export_of_the_text_model_loads_in_transformers(folder, tmp_path):
    model, export = load_language_model(str(folder)), tmp_path / "export"
    model.save_pretrained(export)
    with pytest.raises(DataError, match=r"model_type emu3_text_model"):
        load_language_model(str(export))
    keep_composite_config(model, str(folder), export)
    again = AutoModelForCausalLM.from_pretrained(export).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_plain_config_is_left_as_saved(tmp_path):
    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_text()
    keep_composite_config(model, str(tmp_path), tmp_path)
    assert (tmp_path / "config.json").read_text() == before


@pytest.mark.parametrize("load", [load_language_model, open_weights])
@pytest.mark.parametrize(
    ("family", "said"),
    [
        pytest.param("t5", "no causal language model of model_type t5", id="an encoder-decoder"),
        pytest.param("musicgen", "model_type musicgen has several text models", id="several text models"),
    ],
)
def test_models_without_a_causal_class_are_named(family, said, load, tmp_path):
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path)
    tiny_config(family).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=said):
        load(str(tmp_path))
