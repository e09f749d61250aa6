"""The training benchmark: arithmetic on invented runs, and all systems on a toy model."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import train
import train_launch
import tyro
from train_case import PRESETS
from train_launch import Run, last_error, launch
from train_report import Report, spread

ENVIRONMENT = {
    "git": None,
    "python": "3.11",
    "packages": {"torch": "2.13"},
    "cuda": None,
    "platform": "Linux",
    "device": "x86_64",
    "num_cores": 2,
    "command": ["train.py", "--preset", "toy"],
}
CASE = replace(PRESETS["toy"], warm_up_steps=1, steps=3)  # 512 tokens a step on 2 ranks


def invented(contestant, seconds, first_loss=6.0, failure=None):
    return Run(
        contestant=contestant,
        seconds_to_first_step=10.0,
        step_seconds=(99.0, seconds, seconds, 50.0),  # warm-up, two steps, an outlier
        losses=(first_loss, 5.0),
        peak_memory_bytes=2**30,
        peak_flops=1e12 if contestant == "megaft" else None,
        failure=failure,
    )


def report(*runs):
    return Report(case=CASE, runs=runs, environment=ENVIRONMENT, flops_per_token=10**9)


def test_speeds_are_of_the_median_step_after_warm_up_and_ratios_of_one_repeat():
    made = report(invented("megaft", 1.0), invented("torch", 2.0), invented("megaft", 2.0), invented("torch", 3.0))
    assert made.tokens_per_second("megaft") == [256.0, 128.0]
    assert made.ratios("megaft", "torch") == [2.0, 1.5]
    assert "| megaft / torch | 1.750 [1.500, 2.000] |" in made.markdown()
    assert "| 192.0 [128.0, 256.0] | 19.2% | 1.00 GiB |" in made.markdown()


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        pytest.param(invented("torch", 1.0, first_loss=6.04), True, id="other samples"),
        pytest.param(invented("torch", 1.0, first_loss=3.0), False, id="a loss of another scale"),
        pytest.param(invented("torch", 1.0, failure="OutOfMemoryError"), False, id="a failure"),
    ],
)
def test_a_report_is_sound_when_all_ran_and_began_alike(other, expected):
    made = report(invented("megaft", 1.0), other)
    assert made.is_sound is expected
    assert ("failed: OutOfMemoryError" in made.markdown()) == (other.failure is not None)


def test_spread_of_one_value_is_the_value():
    assert spread([1.25], ".2f") == "1.25"


def test_the_last_error_of_a_log_is_the_cause(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("torch.OutOfMemoryError: CUDA out of memory\n  raise ChildFailedError(\nexits with 1\n")
    assert last_error(log) == "torch.OutOfMemoryError: CUDA out of memory"


@pytest.mark.parametrize(
    ("preset", "parameters", "layers", "width"),  # GPT-2 has 124,439,808 at 1,024 positions
    [
        ("gpt2-124m-cpu", 124_439_808 - (1024 - 128) * 768, 12, 768),
        ("smollm2-135m-cpu", 134_515_008, 30, 576),
        ("gpt2-xl-h100", 1_557_611_200, 48, 1600),
        ("llama-3.2-1b-h100", 1_235_814_400, 16, 2048),
    ],
)
def test_the_shapes_are_those_of_the_published_models(preset, parameters, layers, width):
    case = PRESETS[preset]
    assert case.flops_per_token() == 6 * parameters + 12 * layers * width * case.context_length


def test_a_precision_that_the_recipe_is_not_for_is_refused():
    with pytest.raises(ValueError, match="leave --dtype out"):
        train.Arguments(preset="gpt2-xl-h100", dtype="fp32")


def run_script(script, arguments):
    """Be a rank that runs a program, with the libraries of the fork server."""
    sys.argv, sys.path[0:0] = [script, *arguments], [str(Path(script).parent)]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.fixture
def forked(run_ranks, monkeypatch):
    """Launches start their ranks from the fork server; return the commands that were to be launched."""
    commands = []

    def watch(command, environment, metrics, output):
        commands.append(command)
        first = next(number for number, word in enumerate(command) if word.endswith(".py"))
        codes = run_ranks(CASE.num_ranks, run_script, command[first], command[first + 1 :])
        return 1.0, max(codes)

    monkeypatch.setattr(train_launch, "_watch", watch)
    return commands


@pytest.mark.long
@pytest.mark.slow
def test_all_contestants_train_the_toy_alike(forked, tmp_path):
    flags = ["--preset", "toy", "--repeats", "1", "--steps", "2", "--results", str(tmp_path)]
    assert train.main(tyro.cli(train.Arguments, args=flags)) == 0
    assert [command[2] for command in forked] == [*["deepspeed.launcher.runner"] * 2, *["torch.distributed.run"] * 2]
    (raw,) = tmp_path.glob("train-toy-fp32_*.json")
    runs = {run["contestant"]: run for run in json.loads(raw.read_text())["runs"]}
    assert set(runs) == {"megaft", "trainer", "torch", "compiled"}
    # Equal weights, samples, optimizer and clipping: the Trainer's and torch's losses are one and the same.
    assert runs["trainer"]["losses"] == pytest.approx(runs["torch"]["losses"], abs=1e-4)
    assert runs["megaft"]["losses"] == pytest.approx(runs["torch"]["losses"], abs=0.05)


@pytest.mark.slow
def test_a_launch_is_watched_until_its_end(tmp_path):
    """By its launcher, with the plain loop."""
    CASE.make_inputs(tmp_path)
    run = launch("torch", CASE, tmp_path, tmp_path / "run")
    assert (run.failure, len(run.losses), len(run.step_seconds)) == (None, CASE.max_steps, CASE.max_steps)
    assert run.seconds_to_first_step > 0
