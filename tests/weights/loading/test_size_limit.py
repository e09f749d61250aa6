"""Models far larger than their weight files or the memory are refused before they are built."""

import json
from functools import partial
from zlib import crc32

import pytest
import torch
from tiny_models import edit_json, make_model

from megaft.base.errors import DataError
from megaft.base.untrusted import MAX_LAYERS, require_safe_files
from megaft.weights.loading import memory_budget, size_limit
from megaft.weights.loading.pretrained import create_from, create_language_model, load_language_model, read_new_config
from megaft.weights.loading.size_limit import MemoryBudget, Size, no_larger_than
from megaft.weights.presets import configuration
from megaft.weights.reading import open_weights

LLAMA_PARAMETERS = 2 * (61 * 32) + 32 + 2 * (2 * 32 + 32 * 32 * 2 + 2 * 16 * 32 + 3 * 48 * 32)
LLAMA_TENSORS = 2 + 1 + 2 * (2 + 4 + 3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        pytest.param("config.json", {"n_layer": 1_000_002}, "n_layer 1000002; .* 10,000 layers", id="a million layers"),
        pytest.param("config.json", {"text_config": {"num_hidden_layers": 10_001}}, "num_hidden_layers", id="nested"),
        pytest.param("config.json", {"decoder_layers": 1e308}, "decoder_layers", id="a float"),
        pytest.param("config.json", {"num_layers": float("inf")}, "num_layers Infinity", id="infinitely many"),
        pytest.param("config.json", {"norm_eps": float("nan")}, "norm_eps NaN", id="NaN"),
        pytest.param("config.json", {"pad_token_id": 2**63}, "pad_token_id 9223372036854775808", id="beyond 64 bits"),
        pytest.param("config.json", {"transformers_weights": "b.safetensors"}, "transformers_weights", id="others"),
    ],
)
def test_numbers_that_no_model_has_are_refused_by_name(file, content, says, tmp_path):
    (tmp_path / file).write_text(json.dumps({"model_type": "gpt2"} | content))
    for load in (load_language_model, open_weights, lambda source: create_language_model(f"{source}/{file}", seed=0)):
        with pytest.raises(DataError, match=f"is {tmp_path}.*; its {file} has {says}"):
            load(str(tmp_path))
    with pytest.raises(DataError, match=f"model is {tmp_path}.*; its {file} has {says}"):
        configuration(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        pytest.param("config.json", {"num_hidden_layers": MAX_LAYERS}, id="as many layers as may be"),
        pytest.param("config.json", {"full_attention_layers": [1, 20_000], "layers": None}, id="lists of layers"),
        pytest.param("config.json", {"time_step_limit": [0.0, float("inf")]}, id="infinity, as Mamba 2 has it"),
        pytest.param("config.json", {"a": -(2**63), "b": 2**63 - 1}, id="64 bits"),
        pytest.param("config.json", {"neurons_per_layer": 20_000}, id="a number per layer"),
        pytest.param("config.json", {"model_max_length": 10**30}, id="a model without a longest text"),
        pytest.param("tokenizer_config.json", {"model_max_length": 10**30}, id="a tokenizer without a longest text"),
    ],
)
def test_numbers_that_models_have_pass(file, content, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    require_safe_files("model.path", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("load", [load_language_model, open_weights])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"num_hidden_layers": 9_999}, id="layers"),
        pytest.param({"hidden_size": 2**20}, id="width"),
        pytest.param({"vocab_size": 2**40}, id="vocabulary"),
        pytest.param({"intermediate_size": 10**12}, id="inner width"),
    ],
)
def test_a_model_that_its_weights_cannot_fill_is_not_built(change, load, copy):
    edit_json(copy / "config.json", **change)
    stored = f"but {LLAMA_PARAMETERS:,} in {LLAMA_TENSORS} are stored"
    with pytest.raises(DataError, match=f"is {copy}; .*config.json, .*{stored}"):
        load(str(copy))


@pytest.mark.parametrize("load", [load_language_model, open_weights])
def test_a_small_difference_is_named_by_its_tensor(load, copy):
    edit_json(copy / "config.json", num_hidden_layers=3)
    with pytest.raises(DataError, match=r"config\.json: model\.layers\.2\.\S+ .*\(9 in all\)"):
        load(str(copy))


def test_every_parameter_is_counted_once():
    with no_larger_than(Size(0, 0), "it"):
        for _ in range(size_limit.TENSORS_SLACK):
            layer = torch.nn.Linear(3, 2, bias=False)
            layer.weight = torch.nn.Parameter(torch.zeros(2, 3))  # as transformers does when it loads
        with pytest.raises(DataError, match=r"more than 6,006 weights in 1,001 tensors, but 0 in 0 are stored"):
            torch.nn.Linear(3, 2, bias=False)


@pytest.mark.parametrize(
    ("parts", "ranks"),
    [
        pytest.param(1, 1, id="one rank"),
        pytest.param(1, 2, id="two ranks, each with the whole model"),
        pytest.param(2, 2, id="two ranks with a half each"),
        pytest.param(4, 2, id="two of the ranks that have a quarter each"),
    ],
)
def test_a_new_model_must_fit_in_memory(parts, ranks, tmp_path):
    model = make_model("llama")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    needed = ranks * (4 * LLAMA_PARAMETERS // parts + buffers)
    model.config.save_pretrained(tmp_path)
    source = str(tmp_path / "config.json")
    config = read_new_config(source)
    create = partial(create_from, config, source, 0, parts)
    assert sum(one.numel() for one in create(MemoryBudget(needed, ranks)).parameters()) == LLAMA_PARAMETERS
    each = rf" \({needed // ranks:,} on each of its {ranks} ranks\)" if ranks > 1 else ""
    with pytest.raises(
        DataError, match=rf"^--model.from-scratch is {source}; .* {needed:,} bytes.*{each}, but {needed - 1:,}"
    ):
        create(MemoryBudget(needed - 1, ranks))


def test_ranks_of_a_host_share_its_memory(monkeypatch):
    """Rank 1 of three ranks: the first two share a host; the third has the most memory to itself."""
    hosts = {"a": crc32(b"a"), "b": crc32(b"b")}
    agreed = iter([[hosts["a"], hosts["a"], hosts["b"]], [-40]])
    asked = []
    monkeypatch.setattr(memory_budget, "host_id", lambda: "a")
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 101)
    monkeypatch.setattr(memory_budget.parallel, "rank", lambda: 1)
    monkeypatch.setattr(memory_budget.parallel, "world_size", lambda: 3)
    monkeypatch.setattr(memory_budget.parallel, "max_over_ranks", lambda values: asked.append(values) or next(agreed))
    assert memory_budget.agreed_memory_budget() == MemoryBudget(80, 2)
    assert asked == [[0, hosts["a"], 0], [-50]]
