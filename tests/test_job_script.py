"""Requeueing of jobs: slurm/job.sh with stand-ins for SLURM's commands."""

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "slurm" / "job.sh"
SRUN = """cat "$TURN/events" >> "$RUN/events.jsonl"
[ ! -f "$TURN/ended" ] || cp "$TURN/ended" "$RUN/ended.json"
exit $CODE"""
COMMANDS = {"srun": SRUN, "scontrol": 'echo "$@" >> "$TURN/asked"', "sleep": ":"}
START, SAVE, END = "start", "checkpoint", "end"


@pytest.fixture
def finetune(tmp_path):
    """finetune(before, code, during, ended, restarts) returns the job's code and what was asked of scontrol."""
    turn, run = tmp_path / "turn", tmp_path / "run"
    turn.mkdir()
    run.mkdir()
    for name, text in COMMANDS.items():
        (turn / name).write_text(f"#!/bin/bash\n{text}\n")
        (turn / name).chmod(0o755)

    def rows(events):
        return "".join(json.dumps({"time": "now", "event": event, "step": 1}) + "\n" for event in events)

    def one_turn(before, code, during, ended=None, restarts=2):
        (run / "events.jsonl").write_text(rows(before))
        (run / "ended.json").write_text('{\n  "exit_code": 75,\n  "reason": "an earlier turn"\n}\n')
        (turn / "events").write_text(rows(during))
        if ended is not None:
            (turn / "ended").write_text(f'{{\n  "exit_code": {ended},\n  "reason": "so"\n}}\n')
        environment = {
            **{"PATH": f"{turn}:{os.environ['PATH']}", "TURN": str(turn), "RUN": str(run), "CODE": str(code)},
            **{"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job"},
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
        }
        command = ["bash", "-c", f'. "{SCRIPT}"; finetune --run.dir "{run}"']
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        asked = turn / "asked"
        return done.returncode, asked.read_text().split() if asked.exists() else []

    return one_turn


@pytest.mark.parametrize(
    ("before", "code", "during", "ended", "is_requeued"),
    [
        pytest.param([], 143, [START], 75, True, id="saved after a signal"),
        pytest.param([], 0, [START, SAVE], 0, False, id="done"),
        pytest.param([], 5, [START], 5, False, id="a loss that is not finite"),
        pytest.param([], 2, [], 2, False, id="a mistake"),
        pytest.param([], 75, [], None, False, id="a mistake of a rank while others were starting"),
        pytest.param([], 1, [], None, False, id="a crash before training started"),
        pytest.param([START], 1, [], None, False, id="the same in a later turn"),
        pytest.param([], 134, [START], None, True, id="NCCL aborted"),
        pytest.param([], 137, [START], None, True, id="all ranks killed"),
        pytest.param([START], 139, [START], None, True, id="a second time"),
        pytest.param([START, START], 134, [START], None, False, id="three times"),
        pytest.param([START, START], 134, [START, SAVE], None, True, id="three times, with progress"),
        pytest.param([START, START, START, SAVE], 134, [START], None, True, id="progress in between"),
        pytest.param([END], 143, [END], 75, True, id="a rank lost before training started"),
        pytest.param([END, END], 143, [END], 75, False, id="that three times"),
        pytest.param([START, END, START, END], 143, [START, END], 75, False, id="three times after the start"),
        pytest.param([START, END, END], 143, [START, END], 75, False, id="now before, now after"),
        pytest.param([END, END, START, SAVE, END], 143, [END], 75, True, id="and progress in between"),
        pytest.param([START, END, START, END], 143, [START, SAVE, END], 75, True, id="saved after a signal at last"),
    ],
)
def test_what_goes_back_into_the_queue(finetune, before, code, during, ended, is_requeued):
    found, asked = finetune(before, code, during, ended)
    is_over = not is_requeued and (ended == 75 or (ended is None and START in during))
    assert found == (93 if is_over else code if ended is None else ended)
    assert asked == (["requeue", "7"] if is_requeued else [])


LOST = (143, [END], 75)
"""A turn that loses a rank before training starts: srun's code, its events, and the code in ended.json."""


@pytest.mark.parametrize(("restarts", "is_requeued"), [(0, True), (1, True), (2, False), (9, False)])
def test_only_turns_of_this_job_count(finetune, restarts, is_requeued):
    """An earlier job on the same run may have given up."""
    code, asked = finetune([START, END] * 3, *LOST, restarts=restarts)
    assert (code, asked) == ((75, ["requeue", "7"]) if is_requeued else (93, []))
