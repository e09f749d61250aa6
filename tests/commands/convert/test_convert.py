import hashlib
import json
import math
import shutil
from collections import namedtuple

import pytest
import torch
from conversions import megatron, run
from safetensors.torch import load_file
from tiny_models import edit_json, make_model
from transformers import AutoModelForCausalLM

from megaft.base.errors import CheckpointError, ConfigError, DataError
from megaft.cli import main as command
from megaft.data.tokenizer import load_tokenizer
from megaft.weights import manifest as manifest_module
from megaft.weights import writing
from megaft.weights.checkpoint_reader import WEIGHT
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.reading import open_weights
from megaft.weights.tensor_file import write_shard

SMOL = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "hidden_size": 36}
# what it is: model, changes, tensor-parallel sizes on the way
CASES = {
    "gpt2": ("gpt2", {}, (2, 4)),
    "gpt2 untied": ("gpt2", {"tie_word_embeddings": False}, (4, 2)),
    "llama with groups, tied": ("llama", {"tie_word_embeddings": True}, (2, 1)),
    "llama of 9 heads in 3 groups": ("llama", SMOL | {"tie_word_embeddings": True}, (3, 1)),
    "llama untied with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, (1, 2)),
    "qwen2": ("qwen2", {}, (2, 1)),
}


def require_same(folder, model, change=lambda tensor: tensor):
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, change(expected[name])), name
    tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in (loaded, model)]
    assert tied[0] == tied[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_the_same_bit_for_bit(tmp_path, case):
    name, changes, (first, second) = CASES[case]
    model = make_model(name, **changes)
    model.save_pretrained(tmp_path / "start")
    megatron(tmp_path / "start", tmp_path / "first", first)
    megatron(tmp_path / "first", tmp_path / "second", second)
    run(tmp_path / "second", tmp_path / "end", "hugging-face")
    require_same(tmp_path / "end", model)
    assert (
        load_file(tmp_path / "end/model.safetensors").keys() == load_file(tmp_path / "start/model.safetensors").keys()
    )
    assert len(list((tmp_path / "second").glob("tensor-parallel-*.safetensors"))) == second


def test_rows_fill_the_vocabulary_up(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "start")  # 61 words
    megatron(tmp_path / "start", tmp_path / "four", 4)
    shards = [load_file(path) for path in sorted((tmp_path / "four").glob("*.safetensors"))]
    words = [shard["embedding.word_embeddings.weight"] for shard in shards]
    assert [len(part) for part in words] == [16] * 4
    assert torch.equal(torch.cat(words)[61:], torch.zeros(3, 32))


def test_files_of_at_most_so_many_bytes_in_another_dtype(tmp_path, monkeypatch):
    model = make_model("llama")
    model.save_pretrained(tmp_path / "start")
    (tmp_path / "start/tokenizer.json").write_text("{}")
    monkeypatch.setattr("megaft.weights.writing.SHARD_BYTES", 10_000)
    assert (
        command(f"convert --from {tmp_path}/start --to {tmp_path}/end --format hugging-face --dtype bfloat16".split())
        == 0
    )
    files = sorted((tmp_path / "end").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 12_000 for file in files)
    index = json.loads((tmp_path / "end/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "end/config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "end/tokenizer.json").read_text() == "{}"
    assert (tmp_path / "end/generation_config.json").is_file()
    require_same(tmp_path / "end", model, lambda tensor: tensor.bfloat16())


@pytest.mark.slow
def test_the_manifest(tmp_path, trained_gpt2):
    megatron(trained_gpt2, tmp_path / "two", 2)
    manifest = json.loads((tmp_path / "two/megatron.json").read_text())
    assert manifest["tensor_parallel_size"] == 2
    assert manifest["dtype"] == "float32"
    assert manifest["source"].endswith(trained_gpt2.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]
    assert (tmp_path / "two/tokenizer.json").is_file()
    for name, entry in manifest["files"].items():
        assert (tmp_path / "two" / name).stat().st_size == entry["bytes"]
        assert sha256(tmp_path / "two" / name) == entry["sha256"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


FIRST = "tensor-parallel-00-of-02.safetensors"
DAMAGES = {
    "a bit": (lambda folder: flip(folder / FIRST), f"{FIRST} is damaged"),
    "size": (lambda folder: (folder / FIRST).write_bytes(b"1"), f"{FIRST} has 1 bytes"),
    "missing": (lambda folder: (folder / FIRST).unlink(), f"{FIRST} is missing"),
    "ranks": (lambda folder: edit(folder / "megatron.json", 'parallel_size": 2', 'parallel_size": 3'), "2 files for 3"),
    "format": (lambda folder: edit(folder / "megatron.json", '"format": 1', '"format": 9'), "format 9"),
    "elsewhere": (lambda folder: edit(folder / "megatron.json", FIRST, f"../{FIRST}"), "file in its folder"),
    "name": (lambda folder: edit(folder / "megatron.json", FIRST, "a" * 256), "file in its folder"),
    "no manifest of ours": (lambda folder: (folder / "megatron.json").write_text("{}"), "damaged"),
    "another model's": (lambda folder: edit(folder / "config.json", '"n_embd": 32', '"n_embd": 64'), "do not fit"),
    "code": (lambda folder: edit(folder / "config.json", "{", '{"auto_map": {"AutoModel": "x.py"},'), "auto_map"),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    make_model("gpt2").save_pretrained(folder / "start")
    megatron(folder / "start", folder / "two", 2)
    return folder / "two"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tmp_path, two_ranks, damage):
    change, message = DAMAGES[damage]
    shutil.copytree(two_ranks, tmp_path / "two")
    change(tmp_path / "two")
    with pytest.raises(DataError, match=message):
        run(tmp_path / "two", tmp_path / "end", "hugging-face")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["two"]


def test_training_reads_no_hashes(tmp_path, two_ranks):
    shutil.copytree(two_ranks, tmp_path / "two")
    whole = open_weights(str(tmp_path / "two"))
    flip(tmp_path / "two" / FIRST)
    with pytest.raises(DataError, match=FIRST):
        run(tmp_path / "two", tmp_path / "end", "hugging-face")
    damaged = open_weights(str(tmp_path / "two"))
    differ = [name for name in whole.names if not torch.equal(whole.read(name), damaged.read(name))]
    assert len(differ) <= 1 < len(whole.names) == len(damaged.names)


REFUSED = {
    "it exists": ("start", {"tensor_parallel_size": 2}, "exists"),
    "too many ranks": ("new", {"tensor_parallel_size": 3}, "--tensor-parallel-size is 3, .* use one of 1, 2, 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be(tmp_path, case):
    to, settings, message = REFUSED[case]
    make_model("gpt2").save_pretrained(tmp_path / "start")
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "start", tmp_path / to, "megatron", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format hugging-face --tensor-parallel-size 2", "tensor-parallel-size is 2"),
        ("--format megatron --tensor-parallel-size 0", "tensor-parallel-size is 0"),
        ("--format megatron --text a.txt", "without --verify"),
        ("--format megatron --model-config gpt2", "model-config is gpt2"),
    ],
)
def test_flags_that_have_no_effect(tmp_path, capsys, flags, message):
    make_model("gpt2").save_pretrained(tmp_path / "start")
    assert command(f"convert --from {tmp_path}/start --to {tmp_path}/end {flags}".split()) == 2
    assert message in capsys.readouterr().err


def test_a_family_without_a_layout(tmp_path):
    make_model("gpt-neox").save_pretrained(tmp_path / "start")
    with pytest.raises(ConfigError, match="gpt_neox"):
        run(tmp_path / "start", tmp_path / "end", "hugging-face", dtype="bfloat16")


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_s_gguf_file_over_three_ranks(tmp_path, smollm2_cut):
    megatron(smollm2_cut, tmp_path / "three", 3)
    run(tmp_path / "three", tmp_path / "end", "hugging-face")
    require_same(tmp_path / "end", load_language_model(str(smollm2_cut)))
    expected, found = (load_tokenizer(str(source)) for source in (smollm2_cut, tmp_path / "end"))
    assert found.encode("Hello, world") == expected.encode("Hello, world")


def write_checkpoint(model, folder):
    """Write the weights of a checkpoint as a run on one rank does."""
    pieces = [(f"{WEIGHT}/language_model.{name}@0", p.detach().flatten()) for name, p in model.named_parameters()]
    folder.mkdir(parents=True)
    num_bytes, digest = write_shard(folder / "rank-00000.safetensors", pieces)
    manifest = {
        "format": manifest_module.FORMAT,
        "backend": "hugging-face",
        "tensor_parallel_size": 1,
        "shapes": {f"language_model.{name}": list(p.shape) for name, p in model.named_parameters()},
        "files": {"rank-00000.safetensors": {"bytes": num_bytes, "sha256": digest.hex()}},
    }
    (folder / manifest_module.MANIFEST).write_text(manifest_module.manifest_text(manifest))


def test_a_run_s_checkpoint(tmp_path):
    base, trained = make_model("llama"), make_model("llama")
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_text("{}")
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    saved = tmp_path / "run/checkpoints/step-00000020"
    write_checkpoint(trained, saved)
    with pytest.raises(DataError, match="give --model-config"):
        megatron(saved, tmp_path / "two", 2)
    settings = {"model": {"path": str(tmp_path / "base"), "from_scratch": None}, "lora": {"rank": 0}}
    (tmp_path / "run/config.json").write_text(json.dumps({"settings": settings}))
    megatron(saved, tmp_path / "two", 2)
    assert (tmp_path / "two/tokenizer.json").is_file()
    run(tmp_path / "two", tmp_path / "end", "hugging-face")
    require_same(tmp_path / "end", trained)
    settings["lora"]["rank"] = 8
    (tmp_path / "run/config.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(ConfigError, match="adapters only"):
        megatron(saved, tmp_path / "again", 2)
    flip(saved / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        run(saved, tmp_path / "again", "hugging-face", model_config=str(tmp_path / "base"))


def test_no_room(tmp_path, monkeypatch):
    make_model("gpt2").save_pretrained(tmp_path / "start")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    with pytest.raises(ConfigError, match=r"--to is .* 1,000 are available"):
        megatron(tmp_path / "start", tmp_path / "two", 2)
    assert not (tmp_path / "two").exists()


def test_what_a_killed_one_left_goes(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path / "start")
    (tmp_path / ".two.writing").mkdir()
    (tmp_path / ".two.writing/half").write_text("x")
    megatron(tmp_path / "start", tmp_path / "two", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["start", "two"]
    assert not (tmp_path / "two/half").exists()


def test_float16_that_overflows(tmp_path):
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] = 1e5
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(DataError, match=r"wpe.weight .*100000"):
        run(tmp_path / "start", tmp_path / "end", "hugging-face", dtype="float16")
    assert not (tmp_path / "end").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_not_finite(tmp_path, value, dtype):
    model = make_model("llama").to(getattr(torch, dtype))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[[2, 7], 3] = value
    model.save_pretrained(tmp_path / "start")
    for write in (lambda: megatron(tmp_path / "start", tmp_path / "end", 2), lambda: to_hugging_face(tmp_path)):
        with pytest.raises(DataError, match=r"up_proj\.weight has 2 of 1,536 .* at \[2, 3\];"):
            write()
        assert [path.name for path in tmp_path.iterdir()] == ["start"]


def to_hugging_face(folder):
    run(folder / "start", folder / "end", "hugging-face", dtype="bfloat16")


def test_bfloat16_that_overflows(tmp_path):
    """Its largest number is 3.3895e38, that of float32 3.4028e38."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.wpe.weight[3, 3] = 3.4e38
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(DataError, match=r"wpe.weight .*3.4e\+38, .*bfloat16 .*float32"):
        to_hugging_face(tmp_path)


def test_what_was_written_is_read_before_it_is_published(tmp_path, monkeypatch):
    def untie(config, folder, dtype):
        write_config(config, folder, dtype)
        edit_json(folder / "config.json", tie_word_embeddings=False)

    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    write_config = writing._write_config
    monkeypatch.setattr(writing, "_write_config", untie)
    with pytest.raises(DataError, match=r"lm_head.weight is missing \(1 in all\)"):
        run(tmp_path / "gpt2", tmp_path / "new", "hugging-face")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2"]
