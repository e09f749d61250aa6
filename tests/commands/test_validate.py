"""`megaft validate`: the plan of a run, checked by building it as one of N fake ranks."""

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from validate_settings import GLOBAL_BATCH_SIZE, settings_of

from megaft.base.errors import CheckpointError, ConfigError, DataError
from megaft.commands.validate import RenamingStream, require_room, show, validate
from megaft.config.train import OptimConfig, bytes_per_parameter

PARAMETERS = 45_952  # 512 x 32 + 128 x 32 embeddings, 2 layers of 12,704, 64 of the last norm


@pytest.fixture
def config(toy_model, toy_texts, tmp_path):
    """config(stage=2, world_size=4, **DeepSpeed keys) is a run's settings."""
    return partial(settings_of, toy_model, toy_texts, tmp_path)


@pytest.fixture
def planned(run_ranks):
    """`validate` in a process of its own: DeepSpeed keeps the first process group's groups."""
    return lambda settings: run_ranks(1, validate, settings)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 8), (2, 8), (3, 8)])
def test_a_run_is_built_as_one_of_n_ranks(config, planned, stage, world_size, tmp_path):
    plan = planned(config(stage=stage, world_size=world_size))
    assert plan["global_batch_size"] == 2 * plan["gradient_accumulation_steps"] * world_size == GLOBAL_BATCH_SIZE
    assert plan["tokens"] == 10 * GLOBAL_BATCH_SIZE * 32
    assert plan["parameters"] == plan["trained_parameters"] == PARAMETERS
    assert plan["checkpoint_bytes"] == 12 * PARAMETERS
    assert plan["resumes_from"] is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "keys", "error", "said"),
    [
        pytest.param([], {"train_batch_size": 15}, ConfigError, "on 1 rank:", id="batch sizes"),
        pytest.param([], {"train_batch": 1}, ConfigError, "did you mean", id="a key of the JSON"),
        pytest.param(["--data.context-length=4096"], {}, ConfigError, "128 positions", id="model"),
        pytest.param(["--model.compile=on"], {"stage": 3}, ConfigError, "stage is 3", id="compile"),
        pytest.param(["--optim.warmup-steps=11"], {}, ConfigError, r"optim\.warmup-steps", id="warmup"),
        pytest.param(["--data.train=missing.txt"], {}, DataError, "missing.txt", id="data"),
        pytest.param(["--model.path=/missing"], {}, DataError, "/missing", id="model folder"),
    ],
)
def test_what_training_would_refuse(config, flags, keys, error, said, tmp_path):
    with pytest.raises(error, match=said):
        validate(config(*flags, **keys))
    assert not (tmp_path / "run").exists()
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_cut_model_is_built_as_one_of_n_ranks(config, planned, stage, tmp_path):
    flags = ("--model.backend=megatron", "--parallel.tensor-parallel-size=4")
    cut = planned(config(*flags, stage=stage, world_size=8))  # the sizes are those of the whole model, as above
    assert cut["global_batch_size"] == GLOBAL_BATCH_SIZE
    assert cut["parameters"] == cut["trained_parameters"] == PARAMETERS
    assert cut["checkpoint_bytes"] == 12 * PARAMETERS
    assert (cut["tensor_parallel_size"], cut["data_parallel_size"]) == (4, 2)
    assert cut["micro_batch_size"] * cut["gradient_accumulation_steps"] * 2 == cut["global_batch_size"]


def test_a_world_of_no_ranks_is_refused(config):
    with pytest.raises(ConfigError, match="world-size is 0"):
        config(world_size=0)


@pytest.mark.slow
def test_half_precision_and_gpu_kernels_have_stand_ins(config, planned):
    settings = config("--model.compile=on", stage=1, fp16={"enabled": True})
    plan = planned(replace(settings, optim=OptimConfig(name="apex-adamw")))
    assert (plan["dtype"], plan["optimizer"]) == ("float16", "apex-adamw")
    assert [note.split()[0] for note in plan["notes"][-3:]] == ["float16", "apex-adamw", "compilation"]
    with pytest.raises(ConfigError, match=r"float16 with zero_optimization.stage 0"):
        validate(config(stage=0, fp16={"enabled": True}))


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        (OptimConfig(), 12),
        (OptimConfig(name="sgd"), 4),
        (OptimConfig(name="sgd", momentum=0.9), 8),
        (OptimConfig(name="adafactor"), 8),
    ],
)
def test_bytes_of_a_parameter(optim, expected):
    assert bytes_per_parameter(optim) == expected


def test_too_small_a_disk_is_named_before_training(config, monkeypatch, tmp_path):
    settings = config("--checkpoint.keep-last=3")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=4_999))
    with pytest.raises(CheckpointError, match=r"needs 5,000 bytes more for 5 checkpoints of 1,000 "):
        require_room(settings, 1_000)
    kept = tmp_path / "run" / "checkpoints" / "step-00000001"
    kept.mkdir(parents=True)
    (kept / "rank-00000.safetensors").write_bytes(b"0")  # what is there needs no room
    require_room(settings, 1_000)


def test_a_file_in_place_of_the_run_folder_is_refused(config, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"--run\.dir is .*run"):
        require_room(config(), 1_000)


def test_messages_name_the_user_s_folder(capsys):
    stream = RenamingStream(sys.stdout, {"/tmp/x/deepspeed.json": "mine.json", "/tmp/x": "runs/first"})
    print("looking into /tmp/x/checkpoints and", "/tmp/x/deepspeed.json", file=stream, flush=True)
    assert not stream.isatty()
    assert capsys.readouterr().out == "looking into runs/first/checkpoints and mine.json\n"


def validate_printed(settings):
    """Return the plan and all that `validate` printed."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        plan = validate(settings)
    return plan, printed.getvalue()


def train_two_steps(arguments):
    from megaft.base import parallel
    from megaft.config.train import parse_train
    from megaft.train import train

    return parallel.exit_code_on_ranks(lambda topology: train(parse_train(arguments), topology))


def files_of(folder: Path):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_that_would_continue(config, planned, run_ranks, tmp_path, toy_model, toy_texts):
    """The newest checkpoint is loaded, resharded for other ranks; a damaged one is refused as in training."""
    run_dir, (train, valid) = tmp_path / "run", toy_texts
    settings = config()
    arguments = [
        f"--deepspeed-config={settings.deepspeed_config}",
        f"--model.path={toy_model}",
        f"--data.train={train}",
        f"--data.valid={valid}",
        "--data.context-length=32",
        f"--run.dir={run_dir}",
        "--optim.schedule=constant",
        "--run.max-steps=2",
        "--run.export=none",
    ]
    assert run_ranks(1, train_two_steps, arguments) == [0]
    before = files_of(run_dir)
    ((plan, printed),) = run_ranks(1, validate_printed, config("--optim.schedule=constant", stage=3, world_size=16))
    assert f"looking for checkpoints: {run_dir}\n" in printed
    assert "megaft-validate-" not in printed
    assert (plan["done_steps"], plan["max_steps"], plan["micro_batch_size"]) == (2, 10, 1)
    assert Path(plan["resumes_from"]).parent == run_dir / "checkpoints"
    with pytest.RaisesGroup(pytest.RaisesExc(CheckpointError, match=r"--optim\.learning-rate")):
        planned(config("--optim.schedule=constant", "--optim.learning-rate=1"))
    assert files_of(run_dir) == before

    shard = Path(plan["resumes_from"]) / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.RaisesGroup(pytest.RaisesExc(CheckpointError, match=f"{run_dir}/checkpoints is valid")):
        planned(config("--optim.schedule=constant"))
    (shard.parent / "manifest.json").write_text("{}")  # nor does training start over where no manifest can be read
    with pytest.RaisesGroup(pytest.RaisesExc(CheckpointError, match=f"{run_dir}/checkpoints is valid")):
        planned(config("--optim.schedule=constant"))
    shutil.rmtree(run_dir / "checkpoints")  # events.jsonl still records them
    with pytest.RaisesGroup(pytest.RaisesExc(CheckpointError, match=f"{run_dir}/checkpoints does not exist.*fresh")):
        planned(config("--optim.schedule=constant"))
    before = files_of(run_dir)
    assert planned(config("--run.fresh"))["done_steps"] == 0
    assert files_of(run_dir) == before


def test_what_is_printed(config, planned, capsys):
    plan = planned(config(world_size=4))
    capsys.readouterr()
    show(plan, as_json=True)
    assert json.loads(capsys.readouterr().out) == plan
    show(plan, as_json=False)
    out = capsys.readouterr().out
    assert "16 = micro-batch 2 x accumulation 2 x data-parallel ranks 4\nranks          4\n" in out
    assert "45,952, of which 45,952 are trained" in out
    assert "checkpoint     551,424 bytes\nresumes from   nothing: a new run\n" in out
