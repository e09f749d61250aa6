import json
import time
from contextlib import nullcontext
from threading import Event, Thread

import pytest
import torch

from megaft.base.errors import CheckpointError, ConfigError, LostPeerError, NoProgressError
from megaft.base.files import step_rows, write_json_atomic
from megaft.run import events
from megaft.run.events import Events, record_first, recorded_code, recorded_end, recording_errors


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_event_is_a_line_that_stays(tmp_path):
    for step in (0, 4, 2):
        Events(tmp_path, is_main=True).record("start", step, samples=((1, 3),), loss=float("nan"))
    Events(tmp_path, is_main=False).record("start", 9)
    rows = rows_of(tmp_path / "events.jsonl")
    assert [(row["event"], row["step"], row["samples"], row["loss"]) for row in rows] == [
        ("start", step, [[1, 3]], "nan") for step in (0, 4, 2)
    ]
    assert all(row["time"].endswith("+00:00") for row in rows)


def test_a_line_that_a_full_disk_cut_short_spoils_no_other(tmp_path):
    events = Events(tmp_path, is_main=True)
    events.record("start", 0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026')
    events.record("start", 4)
    assert [row["step"] for row in step_rows(tmp_path / "events.jsonl")] == [0, 4]


def test_an_event_names_files_without_their_folders(tmp_path):
    trail = Events(tmp_path, is_main=True)
    trail.record(
        "end",
        3,
        reason=f"--data.train is {tmp_path}/a.txt; see https://host/a/b or someone/model.",
        names=[f"{tmp_path}/b"],
    )
    (row,) = rows_of(tmp_path / "events.jsonl")
    assert row["reason"] == "--data.train is a.txt; see https://host/a/b or someone/model."
    assert row["names"] == ["b"]


@pytest.mark.parametrize(
    ("restarts", "starts", "step", "is_refused"),
    [
        ("3", [4, 4, 4], 4, True),
        ("3", [0, 4, 4, 4], 4, True),
        ("3", [4, 4, 4], 6, False),
        ("3", [2, 4, 4], 4, False),
        ("3", [4, 4], 4, False),
        ("3", [], 0, False),
        (None, [4, 4, 4], 4, False),  # started by hand
    ],
)
def test_a_requeued_job_that_gets_no_further_is_not_requeued(tmp_path, monkeypatch, restarts, starts, step, is_refused):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    events = Events(tmp_path, is_main=True)
    for number, start in enumerate(starts):
        events.record("start", start)
        events.record("checkpoint", start)
        if number == 0:
            (tmp_path / "events.jsonl").open("a").write('{"event": "start", "st')  # cut by a crash ...
            (tmp_path / "events.jsonl").open("a").write("\n")
    if is_refused:
        with pytest.raises(NoProgressError, match=f"started 3 times at step {step}") as error:
            events.require_progress(step)
        assert error.value.exit_code == 93
    else:
        events.require_progress(step)


@pytest.mark.parametrize(
    ("events", "is_there", "is_refused"),
    [
        (["start"], False, False),
        (["start", "checkpoint"], True, False),
        (["start", "checkpoint"], False, True),
        (["checkpoint", "fresh", "start"], False, False),
        (["checkpoint", "fresh", "checkpoint", "end"], False, True),
    ],
)
def test_checkpoints_whose_folder_is_gone_are_missed(tmp_path, events, is_there, is_refused):
    trail = Events(tmp_path, is_main=True)
    for step, event in enumerate(events):
        trail.record(event, step)
    if is_there:
        (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"--run\.fresh") if is_refused else nullcontext():
        trail.require_checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    "line", ['{"a": 1}', '{"step": "4", "event": "checkpoint"}', '{"step": 4}', "[]", '{"step": 4, "e']
)
def test_a_line_that_is_no_event_is_ignored(tmp_path, monkeypatch, line):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    trail = Events(tmp_path, is_main=True)
    trail.record("start", 0)
    (tmp_path / "events.jsonl").write_text((tmp_path / "events.jsonl").read_text() + line + "\n")
    trail.require_checkpoints(tmp_path / "checkpoints")
    trail.require_progress(0)


def test_the_reason_of_an_end_is_kept_where_there_is_a_run(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError), recording_errors(folder, is_main=True):
            raise ConfigError("a.b is 1; use 2.")
    assert json.loads((tmp_path / "ended.json").read_text()) == {"exit_code": 2, "reason": "a.b is 1; use 2."}
    assert not (tmp_path / "none").exists()


def test_the_reason_of_an_end_names_files_without_their_folders(tmp_path):
    with pytest.raises(ConfigError), recording_errors(tmp_path, is_main=True):
        raise ConfigError(f"--data.train is {tmp_path}/a.txt; check it.")
    assert recorded_end(tmp_path) == (2, "--data.train is a.txt; check it.")


@pytest.mark.parametrize(
    ("code", "error", "reasons"),
    [
        pytest.param(75, LostPeerError("gloo lost a connection."), ["rank 1 died."], id="the collective saw it too"),
        pytest.param(75, ConfigError("a.b is 1."), ["rank 1 died.", "a.b is 1."], id="a mistake of its own"),
        pytest.param(75, OSError(5, "no disk"), ["rank 1 died.", "OSError: [Errno 5] no disk"], id="its own crash"),
        pytest.param(3, LostPeerError("gloo lost a connection."), ["rank 1 died."], id="rank 1 had said why"),
        pytest.param(3, ConfigError("a.b is 1."), ["rank 1 died."], id="both said why"),
    ],
)
def test_a_rank_that_ends_is_one_end_of_the_run(tmp_path, code, error, reasons):
    """The heartbeat and the collective both notice it; slurm/job.sh counts ends."""

    def ends():
        record_first(tmp_path, code, "rank 1 died.")
        raise error

    with pytest.raises(type(error)), recording_errors(tmp_path, is_main=True):
        ends()
    assert [row["reason"] for row in rows_of(tmp_path / "events.jsonl")] == reasons
    assert json.loads((tmp_path / "ended.json").read_text())["reason"] == reasons[-1]


def test_the_main_thread_waits_while_the_heartbeat_writes(tmp_path, monkeypatch):
    """The process would end with it, and no reason be left."""
    has_begun = Event()

    def slowly(path, value):
        has_begun.set()
        time.sleep(0.2)
        write_json_atomic(path, value)

    monkeypatch.setattr(events, "write_json_atomic", slowly)
    heartbeat = Thread(target=record_first, args=(tmp_path, 75, "rank 1 died."))
    heartbeat.start()
    has_begun.wait()
    record_first(tmp_path, 75, "gloo lost a connection.")
    assert recorded_code(tmp_path) == 75
    heartbeat.join()
    assert [row["reason"] for row in rows_of(tmp_path / "events.jsonl")] == ["rank 1 died."]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, id="out of memory"),
        pytest.param(MemoryError(), 1, id="no message"),
        pytest.param(torch.AcceleratorError("CUDA error: uncorrectable ECC error"), None, id="a GPU that fails"),
        pytest.param(KeyboardInterrupt(), None, id="Ctrl-C"),
    ],
)
def test_a_crash_is_an_end_that_may_not_be_requeued(tmp_path, error, code):
    with pytest.raises(type(error)), recording_errors(tmp_path, is_main=True):
        raise error
    assert recorded_code(tmp_path) == code
