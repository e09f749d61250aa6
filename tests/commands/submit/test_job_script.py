"""Requeueing of jobs: slurm/job.sh with stand-ins for SLURM's commands."""

import json
import os
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from megaft.base.files import write_json_atomic

SCRIPT = Path(__file__).parents[3] / "slurm" / "job.sh"
SRUN = """cat "$TURN/events" >> "$RUN/events.jsonl"
[ ! -f "$TURN/ended" ] || cp "$TURN/ended" "$RUN/ended.json"
exit $CODE"""
COMMANDS = {"srun": SRUN, "scontrol": 'echo "$@" >> "$TURN/asked"', "sleep": ":"}
NO_PROGRESS = "for the third time in a row without progress; not requeued"
START, SAVE, END = "start", "checkpoint", "end"


def stand_ins(folder, commands):
    """Create a folder of executable stand-ins."""
    folder.mkdir()
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def finetune(tmp_path):
    """finetune(before, code, during, ended, restarts) returns the job's code and what was asked of scontrol."""
    turn, run = stand_ins(tmp_path / "turn", COMMANDS), tmp_path / "run"
    run.mkdir()

    def rows(events):
        return "".join(json.dumps({"time": "now", "event": event, "step": 1}) + "\n" for event in events)

    def one_turn(before, code, during, ended=None, restarts=2, reason="so"):
        (run / "events.jsonl").write_text(rows(before))
        (run / "ended.json").write_text('{\n  "exit_code": 75,\n  "reason": "an earlier turn"\n}\n')
        (turn / "events").write_text(rows(during))
        if ended is not None:
            write_json_atomic(turn / "ended", {"exit_code": ended, "reason": reason})
        return call(f'finetune --run.dir "{run}"', turn, restarts, RUN=str(run), CODE=str(code))

    return one_turn


def call(command, turn, restarts, **variables):
    """Call a function of the script; return its exit code and the calls of scontrol."""
    environment = {
        **{"PATH": f"{turn}:{os.environ['PATH']}", "TURN": str(turn), **variables},
        **{"SLURM_SUBMIT_DIR": str(turn.parent), "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job"},
        **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
    }
    words = ["bash", "-c", f'. "{SCRIPT}"; {command}']
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    asked = turn / "asked"
    return done.returncode, asked.read_text().split() if asked.exists() else []


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
"""A job turn that loses a rank before training starts: srun's exit code, its events, the code in ended.json."""


@pytest.mark.parametrize(("restarts", "is_requeued"), [(0, True), (1, True), (2, False), (9, False)])
def test_only_turns_of_this_job_count(finetune, restarts, is_requeued):
    """An earlier job on the same run may have given up."""
    code, asked = finetune([START, END] * 3, *LOST, restarts=restarts)
    assert (code, asked) == ((75, ["requeue", "7"]) if is_requeued else (93, []))


HARD = 'rank 1 lost its peers ("C:\\x" {"exit_code": 0}, 50 % \u00e4); the same command continues.'


@pytest.mark.parametrize(
    ("during", "ended", "said"),
    [
        pytest.param([START, END], 75, f"75 {NO_PROGRESS}. Its last turn: {HARD}", id="a lost peer"),
        pytest.param([START], None, f"143 {NO_PROGRESS}. Its last turn: ended without a reason.", id="all killed"),
    ],
)
def test_a_job_that_gives_up_says_so_in_its_folder(finetune, tmp_path, during, ended, said):
    code, asked = finetune([START, END] * 2, 143, during, ended, reason=HARD)
    assert (code, asked) == (93, [])
    end = {"exit_code": 93, "reason": f"the job ended with {said}"}
    assert json.loads((tmp_path / "run" / "ended.json").read_text()) == end
    row = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert datetime.fromisoformat(row.pop("time")).tzinfo
    assert row == {"event": "gave up", "step": None, **end}


# The script passes the signal on; if it does not, the stand-in must end, or the test would wait for it.
TIME_IS_OVER = "trap 'exit 143' USR1; kill -USR1 $PPID; for _ in {1..600}; do /bin/sleep 0.1; done; exit 9"
SLOW_TRAP = 'trap() { /bin/sleep 0.3; builtin trap "$@"; }; '
WINDOW = 'mkdir -p "$OUT/windows/k"; echo 1234 >> "$OUT/windows/k/0.nats"; '


@pytest.mark.parametrize(
    ("turns", "ends"),
    [
        pytest.param([TIME_IS_OVER], [143], id="time is over"),
        pytest.param([TIME_IS_OVER] * 3, [143, 143, 93], id="three times without a window"),
        pytest.param([WINDOW + TIME_IS_OVER] * 4, [143] * 4, id="each time with a window"),
        pytest.param([TIME_IS_OVER] * 2 + [WINDOW + TIME_IS_OVER] + [TIME_IS_OVER] * 3, [143] * 5 + [93], id="one"),
        pytest.param(["exit 5"], [5], id="a mistake"),
        pytest.param([WINDOW + TIME_IS_OVER, "exit 0"], [143, 0], id="done"),
        # SLURM requeues the job, whose script was killed too.
        pytest.param(
            [TIME_IS_OVER] * 2 + [WINDOW + "kill -9 $PPID", TIME_IS_OVER], [143, 143, -9, 143], id="node lost"
        ),
    ],
)
def test_an_evaluation_without_progress_is_not_requeued_for_ever(tmp_path, turns, ends):
    seen = []
    for number, srun in enumerate(turns):
        turn = stand_ins(tmp_path / f"turn-{number}", COMMANDS | {"srun": srun})
        out = tmp_path / "out put"
        seen.append(call(f'evaluate --model gpt2 --output "{out}" --task t', turn, number, OUT=str(out)))
    assert seen == [(end, ["requeue", "7"] if end == 143 else []) for end in ends]


def test_a_signal_during_the_first_moments_of_a_step_reaches_it(tmp_path):
    turn = stand_ins(tmp_path / "turn", COMMANDS | {"srun": TIME_IS_OVER})
    assert call(f"{SLOW_TRAP}evaluate --output {tmp_path / 'out'}", turn, 0) == (143, ["requeue", "7"])
