"""Signals before the first step: the process ends at once, with the code to requeue, and the run's folder says why."""

import json
import os
import signal
import sys
import time
from datetime import timedelta

import psutil
import pytest
from fork_server import CONTEXT

from megaft.base import parallel
from megaft.base.errors import ConfigError
from megaft.run import events, stop
from megaft.run.events import record_first, record_signal, recording_errors

ENOUGH = 300
"""Seconds that end a hang, however busy the machine is."""


def ended(folder):
    path = folder / "ended.json"
    return json.loads(path.read_text()) if path.exists() else None


def wait_for_others(rank, port, folder):
    """Be a rank that waits for the other one."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    stop.listen()

    def run(topology):
        with recording_errors(folder, topology.is_main):
            (folder / "begun").touch()
            parallel.join(topology, timedelta(seconds=ENOUGH))
        return 0

    sys.exit(parallel.exit_code_on_ranks(run))


def until(is_so):
    deadline = time.monotonic() + ENOUGH
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        pytest.param(0, {"exit_code": 75, "reason": "SIGTERM before the first step"}, id="the main rank"),
        pytest.param(1, None, id="another rank"),
    ],
)
def test_a_rank_that_waits_for_others_hears_a_signal(tmp_path, rank, expected):
    port = parallel.free_port()
    process = CONTEXT.Process(target=wait_for_others, args=(rank, port, tmp_path))
    process.start()
    try:
        until((tmp_path / "begun").exists)
        if rank == 0:  # the store listens: the rank is inside the rendezvous
            until(lambda: any(c.laddr.port == port for c in psutil.Process(process.pid).net_connections("tcp")))
        else:
            until(lambda: psutil.Process(process.pid).num_threads() > 1)
            time.sleep(1)
        begin = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        process.join(ENOUGH)
        assert time.monotonic() - begin < 10
    finally:
        process.kill()
    assert process.exitcode == 75
    assert ended(tmp_path) == expected


def test_a_signal_does_not_replace_a_recorded_reason(tmp_path):
    record_first(tmp_path, 3, "no such file.")
    assert record_signal(tmp_path, 75, "SIGTERM before the first step")
    assert ended(tmp_path)["exit_code"] == 3


def test_a_signal_while_an_end_is_being_recorded_waits_for_nothing(tmp_path):
    with events._recording:
        assert not record_signal(tmp_path, 75, "SIGTERM before the first step")
    assert ended(tmp_path) is None


@pytest.mark.parametrize("is_recording", [False, True])
def test_a_signal_ends_the_process_unless_it_is_ending_already(tmp_path, monkeypatch, is_recording):
    codes = []
    monkeypatch.setattr(stop, "_is_training", False)
    monkeypatch.setattr(os, "_exit", codes.append)
    with recording_errors(tmp_path, is_main=True):
        if is_recording:
            with events._recording:
                stop._note(signal.SIGTERM, None)
        else:
            stop._note(signal.SIGTERM, None)
    assert codes == ([] if is_recording else [75])
    assert (ended(tmp_path) is None) is is_recording


@pytest.mark.parametrize("has_met", [False, True])
def test_a_rank_that_fails_before_the_ranks_meet_records_it(tmp_path, monkeypatch, has_met):
    """Else the launcher's SIGTERM would be the reason of the main rank, and the job be requeued in vain."""
    monkeypatch.setattr(parallel, "have_met", lambda: has_met)
    with pytest.raises(ConfigError), recording_errors(tmp_path, is_main=False):
        raise ConfigError("--data.train is a.txt on rank 1.")
    assert ended(tmp_path) == (None if has_met else {"exit_code": 2, "reason": "--data.train is a.txt on rank 1."})
