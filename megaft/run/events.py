"""Audit trail of a run in RUN/events.jsonl, and the reason for its end in RUN/ended.json."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from megaft.base import heartbeat, parallel
from megaft.base.ending import ending_of
from megaft.base.errors import REQUEUE, CheckpointError, LostPeerError, NoProgressError, UserError
from megaft.base.files import naming_disk_errors, parse_json, step_rows, to_json, write_json_atomic
from megaft.base.nested import mapped
from megaft.base.redaction import without_folders
from megaft.run import stop

STARTS_WITHOUT_PROGRESS = 3
"""Number of starts at the same step after which a job is not requeued."""
CLAIM = "ended.json.claim"
"""Lock file: the rank that creates it may write ended.json in place of the main rank."""
_recording = Lock()


class Events:
    """Append-only audit trail, written by the main rank."""

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self._path = run_dir / "events.jsonl" if is_main else None

    def record(self, event: str, step: int | None, **details: Any) -> None:
        """Write an event after `step` steps (None: not known); the line is on disk when this returns.

        Run folders get shared, so absolute paths in the details are cut to file names.
        """
        if self._path is None:
            return
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "event": event,
            "step": step,
            **mapped(details, _public),
        }
        with naming_disk_errors(self._path), self._path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            end = b"" if file.read() in (b"", b"\n") else b"\n"  # else a full disk truncated the last line
            file.write(end + to_json(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def require_checkpoints(self, folder: Path) -> None:
        """Raise CheckpointError on the main rank if the checkpoint folder is gone, as without its mount."""
        if self._path is None or folder.exists() or not self._path.exists():
            return
        last = None
        for row in step_rows(self._path):
            last = {"checkpoint": row["step"], "fresh": None}.get(str(row.get("event")), last)
        if last is not None:
            raise CheckpointError(
                f"{folder} does not exist, but {self._path.name} records checkpoints, the last after step "
                f"{last}. Restore the folder, or start over with --run.fresh."
            )

    def require_progress(self, step: int) -> None:
        """Raise NoProgressError on the main rank if SLURM restarts this job for the third time at the same step."""
        if self._path is None or "SLURM_RESTART_COUNT" not in os.environ or not self._path.exists():
            return
        starts = [row["step"] for row in step_rows(self._path) if row.get("event") == "start"]
        if starts[-STARTS_WITHOUT_PROGRESS:] == [step] * STARTS_WITHOUT_PROGRESS:
            raise NoProgressError(
                f"the job started {STARTS_WITHOUT_PROGRESS} times at step {step} and never got to its next checkpoint; "
                "it is not requeued again. Look at its log, give it more time, or save more often (--checkpoint.every)."
            )


def _public(value: Any) -> Any:
    return without_folders(value) if isinstance(value, str) else value


@contextmanager
def recording_errors(run_dir: Path, is_main: bool) -> Iterator[None]:
    """Write the reason into RUN/ended.json when the block raises: launchers' codes are unreliable.

    The file of an earlier run is removed first. If the main rank is killed, another rank writes the file. So does a
    rank that fails before the process group exists, since it cannot tell the others. After a GPU failure the main rank
    does not write it, since the run may resume elsewhere.
    """
    if is_main:
        for name in ("ended.json", CLAIM):
            (run_dir / name).unlink(missing_ok=True)
    before_exit = stop.before_exit(partial(record_signal, run_dir)) if is_main else nullcontext()
    try:
        with heartbeat.before_forced_exit(partial(record_first, run_dir)), before_exit:
            yield
    except LostPeerError as error:
        if is_main:
            record_first(run_dir, REQUEUE, str(error))
        raise
    except Exception as error:  # re-raised
        ending = ending_of(0, error)
        if is_main and ending:
            record_over_lost_peer(run_dir, ending.exit_code, ending.reason)
        elif ending and not parallel.have_met():
            record_first(run_dir, ending.exit_code, ending.reason)
        raise


def record_end(run_dir: Path, step: int | None, exit_code: int, reason: str) -> None:
    """Write RUN/ended.json and the last event, if the run's folder exists; absolute paths are cut to file names."""
    if run_dir.is_dir():
        Events(run_dir, is_main=True).record("end", step, exit_code=exit_code, reason=reason)
        write_json_atomic(run_dir / "ended.json", {"exit_code": exit_code, "reason": without_folders(reason)})


def record_over_lost_peer(run_dir: Path, exit_code: int, reason: str) -> None:
    """Record an error of the main rank; it replaces a recorded lost peer, but not another rank's error."""
    with _recording:
        if recorded_code(run_dir) in (None, REQUEUE):
            record_end(run_dir, None, exit_code, reason)


def recorded_end(run_dir: Path) -> tuple[int, str] | None:
    """Return the exit code and reason in RUN/ended.json; None if the file does not exist."""
    try:
        end = parse_json((run_dir / "ended.json").read_bytes())
    except FileNotFoundError:
        return None
    return end["exit_code"], end["reason"]


def recorded_code(run_dir: Path) -> int | None:
    """Return the exit code in RUN/ended.json; None if the file does not exist."""
    end = recorded_end(run_dir)
    return end[0] if end else None


def record_signal(run_dir: Path, exit_code: int, reason: str) -> bool:
    """Record a signal that ends this process, from its handler; return False if another end is already being recorded.

    The interrupted thread may be the one that records, so the handler does not wait for it.
    """
    if not _recording.acquire(blocking=False):
        return False
    _recording.release()
    with suppress(UserError):  # a full disk
        record_first(run_dir, exit_code, reason)
    return True


def record_first(run_dir: Path, exit_code: int, reason: str) -> None:
    """Write ended.json in place of the main rank, unless an end is recorded already; safe to call on any rank."""
    claim = run_dir / CLAIM
    with _recording:  # else the main thread would leave while the heartbeat's still writes
        try:
            claim.touch(exist_ok=False)
        except OSError:  # another rank's; or no folder, or no disk
            return
        try:
            if recorded_code(run_dir) is None:
                record_end(run_dir, None, exit_code, reason)
        finally:
            claim.unlink(missing_ok=True)
