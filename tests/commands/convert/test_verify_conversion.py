"""`megaft convert --verify`: run both models on a text and compare their nats."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conversions import megatron
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from megaft.base.errors import DataError, NumericsError
from megaft.commands.convert import verify
from megaft.commands.convert.verify import ComparedModel, rows_of


def test_rows_share_their_ends(tmp_path):
    make_model("gpt2").save_pretrained(tmp_path)  # 64 positions, no tokenizer
    rows = rows_of("abc" * 50, str(tmp_path))
    assert [len(row) for row in rows] == [65, 65, 22]
    assert [rows[0][-1], rows[1][-1]] == [rows[1][0], rows[2][0]]
    assert sum(len(row) - 1 for row in rows) == 149


@pytest.mark.parametrize(
    ("apart", "refusal"),
    [
        (1e-7, None),
        (2e-3, r" differs from a: the largest difference of one token is 0\.002 nats"),
        (math.nan, r" on the text of --verify: 20 of 20 .*non-finite.* token 0 of document 0"),
    ],
)
def test_models_that_differ_are_refused(tmp_path, monkeypatch, apart, refusal):
    make_model("gpt2").save_pretrained(tmp_path)
    costs = iter([torch.full((20,), 4.0).double(), torch.full((20,), 4.0 + apart).double()])
    monkeypatch.setattr(verify, "nats_of", lambda *_: next(costs))
    if refusal:
        with pytest.raises(NumericsError, match=refusal):
            verify.verify(ComparedModel("a"), ComparedModel(str(tmp_path)), "float32", "text " * 30)
    else:
        assert verify.verify(ComparedModel("a"), ComparedModel(str(tmp_path)), "float32", "text " * 30).largest < 1e-6


def test_verify_waits_for_a_busy_machine(tmp_path, monkeypatch):
    """By default torchrun ends after 15 s without its own heartbeat."""
    make_model("gpt2").save_pretrained(tmp_path / "start")
    megatron(tmp_path / "start", tmp_path / "two", 2)
    commands = []
    monkeypatch.setattr(
        verify.subprocess,
        "run",
        lambda command, **_: commands.append(command) or SimpleNamespace(returncode=1),
    )
    with pytest.raises(DataError, match=r"two could .*2 processes"):
        verify.nats_of(ComparedModel(str(tmp_path / "two")), "float32", tmp_path)
    settings = launcher_config(commands[0][3:]).rdzv_configs
    assert settings["heartbeat_timeout"] == settings["read_timeout"] == "600"
    assert int(settings["keep_alive_max_attempt"]) * 5 == 600


def launcher_config(flags):
    """Return torchrun's configuration for these flags."""
    from torch.distributed.run import config_from_args, parse_args

    return config_from_args(parse_args(flags))[0]


def damage_last_rank(folder):
    """Reverse the rows of a matrix, and update the manifest."""
    shard = folder / "tensor-parallel-01-of-02.safetensors"
    tensors = load_file(shard)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    save_file(tensors | {name: tensors[name].flip(0)}, shard, metadata={"format": "pt"})
    manifest = json.loads((folder / "megatron.json").read_text())
    manifest["files"][shard.name]["bytes"] = shard.stat().st_size
    (folder / "megatron.json").write_text(json.dumps(manifest))


@pytest.fixture
def launched(monkeypatch, run_ranks):
    """The sides that --verify runs as it does for users, the first of two ranks; others' ranks import no libraries."""
    launch, sides = verify.nats_of, []

    def nats_of(side, dtype, folder):
        if side.num_ranks == 2 and not sides:
            sides.append(side)
            return launch(side, dtype, folder)
        run_ranks(side.num_ranks, verify.main, [str(folder), dtype, side.source])
        return torch.tensor(json.loads((folder / "nats.json").read_text()), dtype=torch.float64)

    monkeypatch.setattr(verify, "nats_of", nats_of)
    return sides


@pytest.mark.slow
def test_verify_runs_both_models(tmp_path, capsys, launched):
    make_model("llama", attention_bias=True, mlp_bias=True).save_pretrained(tmp_path / "start")
    megatron(tmp_path / "start", tmp_path / "two", 2, dtype="bfloat16", verify=True)
    assert "verified on" in capsys.readouterr().out
    assert launched == [ComparedModel(str(tmp_path / "two"))]
    damage_last_rank(tmp_path / "two")
    text = Path(__file__).read_text()[:300]
    with pytest.raises(NumericsError):
        verify.verify(ComparedModel(str(tmp_path / "start")), ComparedModel(str(tmp_path / "two")), "bfloat16", text)
