"""Launchers of `megaft/train.py`: each trains the same toy run."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from megaft.base.parallel import free_port

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAM = str(ROOT / "megaft" / "train.py")

LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", PROGRAM],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", PROGRAM],
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, PROGRAM],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def flags_of(folder, toy_model, toy_texts):
    settings = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    (folder / "zero1.json").write_text(json.dumps(settings))

    def flags(name):
        return [
            f"--deepspeed_config={folder}/zero1.json",
            f"--model.path={toy_model}",
            f"--data.train={toy_texts[0]}",
            f"--data.valid={toy_texts[1]}",
            "--data.context-length=32",
            f"--run.dir={folder / name}",
            "--run.max-steps=2",
            "--run.export=none",
        ]

    return flags


@pytest.fixture(scope="module")
def run_under(folder, flags_of):
    def run(launcher, *flags):
        command = [*LAUNCHERS[launcher], *flags_of(launcher), *flags]
        # In a folder of its own: nothing may be found by the current directory.
        # Open MPI's files too: those of the same user id outside a user namespace could not be written.
        environment = {**os.environ, "TMPDIR": str(folder)}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, check=False)
        return done, folder / launcher

    return run


def trained(output_path, flags):
    """Run `python megaft/train.py` in a forked process with its imports; return its exit code and output."""
    from megaft import train

    with output_path.open("w") as output, redirect_stdout(output), redirect_stderr(output):
        code = train.main(flags)
    return code, output_path.read_text()


@pytest.fixture(scope="module")
def run_alone(folder, flags_of, run_ranks):
    def run(*flags):
        [(code, said)] = run_ranks(1, trained, folder / "output.log", [*flags_of("alone"), *flags])
        return code, said, folder / "alone"

    return run


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(run_alone):
    code, said, run_dir = run_alone()
    assert code == 0, said
    return rows(run_dir)


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        ("deepspeed", ()),
        pytest.param("torchrun", ("--run.deterministic",), id="torchrun, deterministic"),
        ("mpirun", ()),
    ],
)
def test_every_launcher_trains_the_same(run_under, reference, launcher, flags):
    if shutil.which(LAUNCHERS[launcher][0]) is None:
        pytest.skip(f"{launcher} is not installed")
    done, run_dir = run_under(launcher, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = rows(run_dir)
    recorded = json.loads((run_dir / "config.json").read_text())
    assert recorded["environment"]["is_deterministic"] == recorded["settings"]["run"]["deterministic"] == bool(flags)
    assert [row["step"] for row in ours] == [row["step"] for row in reference] == [0, 1, 2, 2]
    for row, expected in zip(ours, reference, strict=True):
        if "loss" in row:
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert ours[0]["validation"] == reference[0]["validation"]


def test_a_row_has_every_metric(reference):
    expected = {
        *("step", "loss", "tokens_seen", "learning_rate", "grad_norm"),
        *("tokens_per_second", "mfu", "peak_memory_bytes", "seconds"),
    }
    assert expected <= set(reference[1])
    assert reference[1]["tokens_seen"] == 4 * 32
    assert set(reference[-1]) == {"step", "validation"}
    assert {"nats_per_token", "perplexity", "word_perplexity", "bits_per_byte"} <= set(reference[-1]["validation"])


def test_what_a_user_gets_wrong_is_said_once_without_a_traceback(run_under):
    done, _ = run_under("deepspeed", "--data.valid=missing.txt")
    assert done.returncode == 3
    output = done.stdout + done.stderr
    assert output.count("missing.txt, which is neither a text file nor the prefix") == 1
    assert "Traceback" not in output


def test_a_library_first_on_the_path_is_not_hidden(run_under, tmp_path):
    """As a script's folder, megaft/ would be first on sys.path; its modules must not shadow libraries."""
    done = subprocess.run(
        [sys.executable, PROGRAM, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "--deepspeed-config" in done.stdout


def test_a_run_continues_with_its_own_settings_only(run_alone, reference):
    """Another learning rate or validation window would make its rows and best checkpoint inconsistent."""
    code, said, run_dir = run_alone("--optim.learning-rate=3e-3", "--eval.stride=8", "--run.max-steps=3")
    assert code == 4
    for setting in (
        "--optim.learning-rate: 0.0001 in the checkpoint, 0.003 in this run",
        "--data.valid (or --eval.*): ",
        "--run.max-steps (or --run.epochs): 2 in the checkpoint, 3 in this run",
        "--run.fresh",
    ):
        assert setting in said
    assert rows(run_dir) == reference
    code, said, run_dir = run_alone()
    assert code == 0
    assert "after 2 steps" in said
    assert rows(run_dir) == reference
