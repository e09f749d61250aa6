import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import change_tensors, edit_json, make_model
from transformers import AutoModelForCausalLM

from megaft.base.errors import DataError
from megaft.weights.layout import layout_of
from megaft.weights.parameters import shapes_of
from megaft.weights.reading import open_weights
from megaft.weights.writing import copy_companions

CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama with groups, tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral with a sliding window", {"sliding_window": None}),
}


def make_folder(folder, name, changes, **options):
    model = make_model(name, **changes)
    model.save_pretrained(folder, **options)
    return model


def require_same(weights, model):
    parameters = dict(model.named_parameters())
    assert weights.names == tuple(parameters)
    for name, parameter in parameters.items():
        assert weights.shape(name) == parameter.shape
        assert torch.equal(weights.read(name), parameter), name


@pytest.mark.parametrize("case", CASES)
def test_the_layout_has_all_parameters_and_no_others(case):
    name, changes = CASES[case]
    config = make_model(name, **changes).config
    sources = [source for rule in layout_of(config).rules.values() for source in rule.sources]
    assert sorted(sources) == sorted(shapes_of(config))


@pytest.mark.parametrize("case", CASES)
def test_a_folder_reads_as_transformers_has_it(tmp_path, case):
    name, changes = CASES[case]
    model = make_folder(tmp_path, name, changes)
    require_same(open_weights(str(tmp_path)), model)


def test_several_files_and_names_without_the_prefix(tmp_path):
    model = make_folder(tmp_path, "gpt2", {}, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    require_same(open_weights(str(tmp_path)), model)
    tensors = {
        name.removeprefix("transformer."): tensor
        for path in tmp_path.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    for path in tmp_path.glob("*.safetensors*"):
        path.unlink()
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)  # as the files of 2019 have
    save_file(tensors | {"h.0.attn.bias": mask}, tmp_path / "model.safetensors")
    require_same(open_weights(str(tmp_path)), model)


def test_bin_files_and_a_run(tmp_path):
    model = make_folder(tmp_path / "run/export", "llama", {})
    require_same(open_weights(str(tmp_path / "run")), model)
    (tmp_path / "run/export/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "run/export/pytorch_model.bin")
    require_same(open_weights(str(tmp_path / "run")), model)


def test_stored_dtypes_stay(tmp_path):
    make_folder(tmp_path, "llama", {})
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    norm = "model.norm.weight"
    save_file(tensors, path)
    assert open_weights(str(tmp_path)).dtype == torch.bfloat16
    save_file(tensors | {norm: tensors[norm].float()}, path)
    weights = open_weights(str(tmp_path))
    assert weights.dtype == torch.float32
    assert weights.read(norm).dtype == torch.float32
    assert weights.read("lm_head.weight").dtype == torch.bfloat16
    save_file(tensors | {norm: tensors[norm].half()}, path)
    assert open_weights(str(tmp_path)).dtype == torch.float32  # holds both


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache; hub(model, **options) adds someone/tiny and returns its folder."""

    def put(model, **options):
        commit = "0" * 40
        repo = tmp_path / "hub/models--someone--tiny"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs/main").write_text(commit)
        model.save_pretrained(repo / "snapshots" / commit, **options)
        return repo / "snapshots" / commit

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return put


def test_the_hub_s_cache(hub):
    model = make_model("gpt2")
    folder = hub(model, max_shard_size="20KB")
    require_same(open_weights("someone/tiny"), model)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    gone = sorted(set(index["weight_map"].values()))[1]
    (folder / gone).unlink()
    with pytest.raises(DataError, match=gone):
        open_weights("someone/tiny")


def test_one_file_in_the_hub_s_cache(hub, tmp_path):
    model = make_model("gpt2")
    folder = hub(model)
    (folder / "tokenizer.json").write_text("{}")
    require_same(open_weights("someone/tiny"), model)
    tmp_path.joinpath("to").mkdir()
    copy_companions("someone/tiny", tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["generation_config.json", "tokenizer.json"]


HEAD = "model.layers.1.mlp.up_proj.weight"
DAMAGES = {
    "missing": (lambda folder: change_tensors(folder, lambda tensors: tensors.pop(HEAD)), f"{HEAD} is missing"),
    "a layer more": (
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1),
        r"has no model.layers.1.\S+ \(9 in all\)",
    ),
    "misshapen": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({HEAD: torch.zeros(48, 31)})),
        r"up_proj.weight is \[48, 31\], not \[48, 32\]",
    ),
    "no floats": (
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[HEAD].int()})),
        "up_proj.weight as I32",
    ),
    "cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4]),
        "truncated",
    ),
    "code": (lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "evil.py"}), "auto_map"),
    "no number": (lambda folder: edit_json(folder / "config.json", hidden_size="wide"), "cannot build a model"),
    "no heads": (lambda folder: edit_json(folder / "config.json", num_attention_heads=0), "cannot build a model"),
    "no such activation": (lambda folder: edit_json(folder / "config.json", hidden_act="zzz"), "cannot build a model"),
    "quantized": (
        lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"}),
        "quantized",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "another output layer": (
        lambda folder: edit_json(folder / "config.json", tie_word_embeddings=True),
        "tie_word_embeddings",
    ),
    "index": (
        lambda folder: (
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            (folder / "model.safetensors").rename(folder / "c.safetensors"),
        ),
        "b.safetensors",
    ),
    "two sets": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        r"model.safetensors and model.safetensors.index.json; remove",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named(tmp_path, damage):
    make_folder(tmp_path, "llama", {})
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(DataError, match=message):
        open_weights(str(tmp_path))


def test_what_older_versions_stored_beside_weights_is_left_out(tmp_path):
    make_folder(tmp_path, "llama", {})
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(tmp_path, lambda tensors: tensors.update(buffer))
    assert not buffer.keys() & {*open_weights(str(tmp_path)).names}


@pytest.mark.parametrize("source", ["/no/such/folder", "./nor/this", "nobody/has-this"])
def test_no_such_model(source):
    with pytest.raises(DataError, match=source):
        open_weights(source)


def test_reading_leaves_no_pages_mapped(tmp_path):
    make_folder(tmp_path, "gpt2", {})
    weights = open_weights(str(tmp_path))
    weights.read("transformer.wte.weight")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_the_small_trained_model(trained_gpt2):
    require_same(open_weights(str(trained_gpt2)), AutoModelForCausalLM.from_pretrained(trained_gpt2))
