import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megaft.config.train import LoraConfig, ModelConfig
from megaft.models import hugging_face
from megaft.run.identity import loaded_model
from megaft.weights.identity import config_fields, fingerprint_of_weights, local_config


@pytest.fixture
def copy(toy_model, tmp_path):
    return shutil.copytree(toy_model, tmp_path / "elsewhere" / "copy")


def test_a_moved_or_resharded_model_has_the_same_fingerprint(toy_model, copy):
    expected = fingerprint_of_weights(str(toy_model))
    assert fingerprint_of_weights(str(copy)) == expected
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, copy / file, {"any": "other"})
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert fingerprint_of_weights(str(copy)) == expected


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.ln_2.bias"])
def test_one_other_value_gives_another_fingerprint(toy_model, copy, name):
    weights = load_file(copy / "model.safetensors")
    weights[name].view(-1)[-1] += 0.5
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert fingerprint_of_weights(str(copy)) != fingerprint_of_weights(str(toy_model))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "mp_rank_00/model_optim_rng.pt", "model.gguf"])
def test_other_formats_have_fingerprints_too(tmp_path, file):
    path = tmp_path / "model" / file
    path.parent.mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    source, seen = path if path.suffix == ".gguf" else tmp_path / "model", set()
    for value in (0.0, 1.0):
        torch.save({"weight": torch.full((50, 50), value)}, path)
        seen.add(fingerprint_of_weights(str(source)))
    assert len(seen) == 2


def test_what_is_not_computed_with_is_left_out_of_the_configuration(toy_model, copy):
    config = json.loads((copy / "config.json").read_text())
    other = config | {"transformers_version": "1", "use_cache": False, "_name_or_path": "x", "time_limit": (0, 1.5)}
    (copy / "config.json").write_text(json.dumps(other))
    fields = local_config(str(copy))
    assert fields == local_config(str(toy_model)) | {"time_limit": [0, 1.5]}
    assert fields["n_head"] == 4
    (copy / "config.json").write_text("{")
    assert local_config(str(copy)) is None


class Settings:
    """The settings of a run that `loaded_model` reads."""

    def __init__(self, path, dropout=None, **lora):
        self.model, self.lora = ModelConfig(path=str(path), dropout=dropout), LoraConfig(**lora)

    def identity(self):
        model = hugging_face.build(self.model, self.lora, seed=0)
        return loaded_model(self, model, "architecture")


def test_a_model_of_the_same_shapes_is_told_from_another(toy_model, copy):
    changed = {"n_head": 2, "layer_norm_epsilon": 1e-3, "activation_function": "relu", "attn_pdrop": 0.5}
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    then, now = (Settings(folder).identity() for folder in (toy_model, copy))
    assert {name for name in now.config if then.config[name] != now.config[name]} == changed.keys()
    assert then.weights == now.weights
    assert "attn_pdrop" not in Settings(copy, dropout=0.2).identity().config


def test_adapters_are_identified_by_their_settings_and_layers(toy_model):
    assert Settings(toy_model).identity().lora == {"rank": 0}
    default, named = (
        Settings(toy_model, rank=4).identity(),
        Settings(toy_model, rank=4, target_modules=("c_attn",)).identity(),
    )
    assert default == named
    assert default.lora == {"rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": "c_attn"}


def test_rotary_settings_and_infinite_values_are_fields():
    from transformers import LlamaConfig, Mamba2Config

    assert config_fields(LlamaConfig().to_dict())["rope_parameters"]["rope_theta"] == 10000
    assert config_fields(Mamba2Config().to_dict())["time_step_limit"] == [0, float("inf")]
