"""`megaft submit`, and the batch scripts' handling of exit codes and signals, without SLURM."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megaft.cli import main
from megaft.commands.submit import batch_script, walltime

SLURM = Path(__file__).parents[3] / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
ENOUGH = 300
"""Timeout in seconds, generous for a busy machine."""
FLAGS = ["--deepspeed_config=x.json", "--model.path=gpt2", "--data.train=t.txt", "--run.dir=r", "--run.max-steps=3"]
NASTY = ["a b", "$(touch canary)", "`id`", "it's", '"', "#", "*", "ünï", "", "-x", "\\"]
NO_SECRETS = (
    "HOME,USER,PATH,LANG,LD_LIBRARY_PATH,CUDA_HOME,TMPDIR,PYTHON,MEGAFT_HOME,MEGAFT_DATA,HF_HOME,HF_HUB_OFFLINE,"
    "OMP_NUM_THREADS,DS_ACCELERATOR,MASTER_ADDR,MASTER_PORT,NCCL_DEBUG,NCCL_SOCKET_IFNAME,NCCL_IB_HCA,"
    "GLOO_SOCKET_IFNAME,WANDB_MODE"
)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(name, script) puts a program before all others on PATH; SLURM's own are not on it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (
        "bash",
        "sed",
        "xargs",
        "printf",
        "rm",
        "sleep",
        "cat",
        "touch",
        "env",
        "mkdir",
        "find",
        "awk",
        "tail",
    ):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))

    def add(name, script):
        path = folder / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)
        return path

    return add


def submitted(capsys, *arguments, code=0):
    """Return the output of `megaft submit`, with tyro's boxes unwrapped."""
    try:
        ended = main(["submit", *arguments])
    except SystemExit as exit_of_parser:
        ended = exit_of_parser.code
    assert ended == code
    streams = capsys.readouterr()
    return streams.out if code == 0 else " ".join(streams.err.replace("│", " ").split())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_keeps_its_promises(path):
    directives = batch_script.directives_of(batch_script.read_script(path))
    assert directives["export"] == NO_SECRETS
    assert directives["open-mode"] == "append"
    assert "requeue" in directives
    assert path.name.startswith("prepare") or directives["signal"].startswith("B:USR1@")


def test_shellcheck_is_content(tmp_path, capsys):
    filled = tmp_path / "filled.sbatch"
    filled.write_text(submitted(capsys, "--print", "evaluate_zero_shot", "--job-name", "it's", "--", *FLAGS))
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, *SCRIPTS, SLURM / "job.sh", filled], check=True)


def test_directives_are_filled_in(programs, capsys):
    options = ["--nodes=3", "--gpus-per-node=4", "--time=1-12", "--partition=a", "--account=b", "--job-name=my run"]
    options += ["--mem=64G", "--qos=long"]
    text = submitted(capsys, "finetune_multinode", "--print", *options, "--", *FLAGS)
    original = batch_script.directives_of((SLURM / "finetune_multinode.sbatch").read_text())
    assert batch_script.directives_of(text) == original | {
        **{"nodes": "3", "gpus-per-node": "4", "ntasks-per-node": "4", "time": "1-12"},
        **{"partition": "a", "account": "b", "job-name": "my run", "mem": "64G", "qos": "long"},
    }
    assert text.count("#SBATCH --nodes") == 1


def test_without_gpus_there_is_no_gpu_directive(programs, capsys):
    text = submitted(capsys, "finetune_1node", "--print", "--gpus-per-node=0", "--ntasks-per-node=2", "--", *FLAGS)
    assert "--gpus-per-node" not in text.split("set --")[0].split("#SBATCH", 1)[1]
    assert "#SBATCH --ntasks-per-node=2\n" in text


def test_a_flag_reaches_the_program_as_it_was_written(programs, tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "job.sh").write_text("run_tasks() { printf '%s\\0' \"$@\"; }\n")
    monkeypatch.setattr(batch_script, "ROOT", tmp_path)
    text = batch_script.fill_in(batch_script.read_script(SLURM / "prepare_data.sbatch"), {}, NASTY)
    done = subprocess.run(["bash"], input=text, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:-1] == ["-m", "megaft.cli", "prepare", *NASTY]
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("time_limit", "is_accepted"),
    [
        *((value, True) for value in ("90", "1:30", "12:00:00", "100:00:00", "2-12", "1-0:30", "7-23:59:59")),
        *((value, False) for value in ("", "0", "00:00:00", "1:60", "1:00:60", "1-24", "2h", "-5", "1:", "12:00:00\n")),
    ],
)
def test_walltime(time_limit, is_accepted, programs, capsys):
    arguments = ["evaluate_zero_shot", "--print", f"--time={time_limit}"]
    said = submitted(capsys, *arguments, code=0 if is_accepted else 2)
    assert is_accepted or f"time is {time_limit!r}" in said


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("2-12", 216_000), ("1-0:30", 88_200), ("1-00:00:02", 86_402)],
)
def test_seconds_of_a_walltime(limit, seconds):
    assert walltime.seconds_of(limit) == seconds


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["--job-name=a\n#SBATCH --uid=0"], "job-name is 'a\\n#SBATCH --uid=0'", id="newline"),
        pytest.param(["--account=a\0b"], "account is 'a\\x00b'", id="NUL"),
        pytest.param(["--partition=a\rb"], "partition is 'a\\rb'", id="carriage return"),
        pytest.param(["--", "--output", "x\ny"], "a flag is 'x\\ny'", id="newline in a flag"),
        pytest.param(["--mem=64GB"], "mem is '64GB'; use 64G", id="memory"),
        pytest.param(["--array=1-"], "array is '1-'; use numbers and ranges", id="array"),
        pytest.param(["--nodes=0"], "nodes is 0; use 1 or more", id="no nodes"),
        pytest.param(["--gpus-per-node=-1"], "gpus-per-node is -1; use 0 or more", id="negative GPUs"),
        pytest.param([], "sbatch is not installed here; use --print", id="no sbatch"),
    ],
)
def test_refused(arguments, said, programs, capsys):
    assert said in submitted(capsys, "evaluate_zero_shot", *arguments, code=2)


def test_an_unknown_recipe_is_answered_with_all(programs, capsys):
    said = submitted(capsys, "finetune", "--print", code=2)
    assert "finetune is neither a batch script nor a recipe" in said
    assert all(path.stem in said for path in SCRIPTS)


def test_a_wrong_training_flag_is_said_before_the_job_waits(programs, capsys):
    said = submitted(capsys, "finetune_1node", "--print", "--", *FLAGS, "--optim.learning-rat=1", code=2)
    assert "--optim.learning-rat" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"#!/bin/bash\n#SBATCH --nodes=1\r\n", "s.sbatch:2 ends in CR LF", id="CRLF"),
        pytest.param(b"#!/bin/bash\n\xff\n", "a byte at 12 that is not UTF-8", id="binary"),
        pytest.param(b"", "is not a script", id="empty"),
        pytest.param(b"#!/bin/bash\n\0\n", "is not a script", id="NUL"),
    ],
)
def test_a_script_that_cannot_run_is_refused(content, said, programs, tmp_path, capsys):
    (tmp_path / "s.sbatch").write_bytes(content)
    assert said in submitted(capsys, "--print", str(tmp_path / "s.sbatch"), code=2)


SINFO = "echo 'main* 2 1-00:00:00 gpu:a100:4(S:0-1)'; echo 'main* 3 1-00:00:00 gpu:2'; echo 'cpu 9 infinite (null)'"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        pytest.param(["--nodes=5", "--gpus-per-node=4"], None, id="as many as there are"),
        pytest.param(["--nodes=6"], "--nodes is 6, but partition main has 5;", id="too many nodes"),
        pytest.param(["--gpus-per-node=8"], "--gpus-per-node is 8, but partition main has 4;", id="too many GPUs"),
        pytest.param(["--partition=cpu", "--gpus-per-node=0", "--nodes=9"], None, id="another partition"),
        pytest.param(
            ["--partition=cpu"], "--gpus-per-node is 4, but partition cpu has 0;", id="the script's own number"
        ),
        pytest.param(["--time=24:00:00"], None, id="as long as there is"),
        pytest.param(["--time=1-0:00:01"], "--time is 1-0:00:01, but partition main allows 1-00:00:00;", id="too long"),
        pytest.param(["--partition=gpu"], "partition is gpu; use one of main, cpu.", id="unknown partition"),
    ],
)
def test_resources_are_those_of_sinfo(options, said, programs, capsys):
    programs("sinfo", SINFO)
    answer = submitted(capsys, "evaluate_zero_shot", "--print", *options, code=2 if said else 0)
    assert said is None or said in answer


def test_a_time_that_only_the_signal_fills_is_refused(programs, capsys):
    said = submitted(capsys, "finetune_multinode", "--print", "--time=5", "--", *FLAGS, code=2)
    assert "--time is 5, but the script asks SLURM for a signal 300 s before the limit" in said


def test_a_silent_sinfo_checks_nothing(programs, capsys):
    programs("sinfo", "exit 1")
    assert main(["submit", "evaluate_zero_shot", "--print", "--nodes=99"]) == 0
    streams = capsys.readouterr()
    assert "sinfo failed" in streams.err
    assert streams.out.startswith("#!/bin/bash\n")


def test_sbatch_gets_what_print_shows(programs, tmp_path, capsys):
    programs("sbatch", f"cat > {tmp_path}/got; exit 7")
    shown = submitted(capsys, "evaluate_zero_shot", "--print", "--time=5", "--", *NASTY)
    assert main(["submit", "evaluate_zero_shot", "--time=5", "--", *NASTY]) == 7
    assert (tmp_path / "got").read_text() == shown


@pytest.fixture
def start_job(programs, tmp_path, monkeypatch):
    """start_job(script, ranks, *flags): the script with an srun that runs `ranks` once, and a scontrol that ends it."""
    programs("srun", 'while [ "$1" != "$PYTHON" ]; do shift; done; exec "$@"')
    programs("scontrol", f'echo "$@" >> {tmp_path}/scontrol; kill -9 $PPID')
    environment = {
        **{"SLURM_SUBMIT_DIR": str(SLURM.parent), "SLURM_JOB_ID": "5", "SLURM_JOB_NAME": "job"},
        **{"SLURM_ARRAY_TASK_ID": "2", "PATH": os.environ["PATH"]},
    }

    def start(script, ranks, *flags, turn="0"):
        environment.update(PYTHON=str(programs("ranks", ranks)), SLURM_RESTART_COUNT=turn)
        command = ["bash", SLURM / script, *flags]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE)

    return start


@pytest.mark.parametrize(
    ("ended", "rank_code", "code", "is_requeued"),
    [
        pytest.param(None, 0, 0, False, id="done"),
        pytest.param(75, 75, -signal.SIGKILL, True, id="requeue me"),
        pytest.param(75, 143, -signal.SIGKILL, True, id="requeue me, but srun ended the others"),
        pytest.param(93, 143, 93, False, id="stopped by the user"),
        pytest.param(5, 5, 5, False, id="not finite"),
        pytest.param(None, 137, 137, False, id="killed"),
        pytest.param(None, 75, 75, False, id="a rank's 75 is not the run's"),
    ],
)
def test_how_training_ends_decides(ended, rank_code, code, is_requeued, start_job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ended.json").write_text('{"exit_code": 75}')  # of the turn before, which must not count
    write = "" if ended is None else f"""echo '{{"exit_code": {ended}, "reason": "-"}}' > run/ended.json;"""
    job = start_job("finetune_1node.sbatch", f"{write} exit {rank_code}", "--run.dir=run")
    assert job.wait(timeout=ENOUGH) == code
    calls = tmp_path / "scontrol"
    assert calls.exists() == is_requeued
    assert not is_requeued or calls.read_text() == "requeue 5\n"


@pytest.mark.parametrize(
    ("script", "flags", "is_requeued"),
    [
        pytest.param("finetune_multinode.sbatch", ["--run.dir", "run"], False, id="training decides"),
        pytest.param("evaluate_zero_shot.sbatch", [], True, id="evaluation is cut off"),
    ],
)
def test_a_signal_to_the_script_reaches_the_ranks(script, flags, is_requeued, start_job, tmp_path):
    ranks = (
        f"trap 'touch {tmp_path}/heard; exit 3' USR1; touch {tmp_path}/ready; for i in {{1..6000}}; do sleep 0.05; done"
    )
    job = start_job(script, ranks, *flags)
    while not (tmp_path / "ready").exists():
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=ENOUGH) == (-signal.SIGKILL if is_requeued else 3)
    assert (tmp_path / "heard").exists()


@pytest.mark.parametrize(("turn", "added"), [("0", []), ("1", ["--run.no-fresh"])])
def test_only_the_first_turn_starts_over(turn, added, start_job, tmp_path):
    job = start_job(
        "finetune_1node.sbatch", f"printf '%s\\n' \"$@\" > {tmp_path}/got", "--run.dir=r", "--run.fresh", turn=turn
    )
    assert job.wait(timeout=ENOUGH) == 0
    assert (tmp_path / "got").read_text().splitlines()[1:] == ["--run.dir=r", "--run.fresh", *added]


def test_a_run_folder_is_required(start_job):
    job = start_job("finetune_1node.sbatch", "exit 0", "--model.path", "gpt2")
    assert "error: --run.dir is not among the flags" in job.communicate(timeout=ENOUGH)[1]
    assert job.returncode == 2


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("--a 1\n--b 'two words' \"$HOME\"\n", ["--b", "two words", "$HOME", "--run.dir", "base/2"]),
        ("--a 1\n--run.dir other", ["--run.dir", "other", "--run.dir", "other/2"]),
        ("--a 1\n", None),
        ("--a 1\n'open\n", None),
    ],
)
def test_a_sweep_adds_its_line(lines, words, start_job, tmp_path):
    (tmp_path / "sweep.txt").write_text(lines)
    ranks = f"printf '%s\\n' \"$@\" > {tmp_path}/got"
    job = start_job("finetune_sweep.sbatch", ranks, "sweep.txt", "--run.dir=base")
    said = job.communicate(timeout=ENOUGH)[1]
    if words is None:
        assert job.returncode == 2
        assert "error: line 2 of sweep.txt has no flags" in said
    else:
        got = (tmp_path / "got").read_text().splitlines()
        assert got == [str(SLURM.parent / "megaft" / "train.py"), "--run.dir=base", *words]
