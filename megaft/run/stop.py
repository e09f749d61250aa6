"""Requests to stop or save a run between steps: signals, the clock, and files in its folder.

This module is imported before the heavy libraries and imports none of them: importing torch takes seconds, during
which a signal would kill the process.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megaft.base.errors import DO_NOT_REQUEUE, REQUEUE

STARTED = time.monotonic()
SIGNALS = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: REQUEUE, signal.SIGHUP: REQUEUE, signal.SIGINT: 130}
"""Exit code of a run that a signal stopped; 130 is what shells show after Ctrl-C."""

_received: list[int] = []
_is_training = False
_before_exit: Callable[[int, str], bool] | None = None


def listen() -> None:
    """Install signal handlers that record stop signals instead of ending the process, and forget earlier signals.

    Signals ignored by the parent, as under `nohup`, stay ignored. A second Ctrl-C ends the process at once.
    """
    _received.clear()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number: int, _: object) -> None:
    # Launchers also send SIGTERM to the peers of a failed rank. Before the first step there is nothing to save.
    if number != signal.SIGUSR1 and not _is_training:
        exit_code, reason = SIGNALS[signal.Signals(number)], f"{signal.Signals(number).name} before the first step"
        if _before_exit is None or _before_exit(exit_code, reason):
            os._exit(exit_code)
        return  # this process is about to end for another reason
    if number == signal.SIGINT and number in _received:
        raise KeyboardInterrupt
    _received.append(number)


@contextmanager
def before_exit(record: Callable[[int, str], bool]) -> Iterator[None]:
    """Within the block: call `record(exit_code, reason)` before a signal ends this process ahead of its first step.

    If `record` returns False, the process continues, since it is already ending for another reason.
    """
    global _before_exit
    _before_exit = record
    try:
        yield
    finally:
        _before_exit = None


@dataclass(frozen=True, slots=True)
class Request:
    """Request to all ranks after a step."""

    exit_code: int | None
    """Exit code after saving; None continues training."""
    reason: str


class StopRequests:
    """Stop requests as seen by this rank."""

    def __init__(self, run_dir: Path, max_minutes: float | None, is_main: bool) -> None:
        global _is_training
        _is_training = True
        self._max_seconds = float("inf") if max_minutes is None else 60 * max_minutes
        # Only the main rank looks for the files, so that all ranks agree.
        self._files = (run_dir / "STOP", run_dir / "SAVE") if is_main else ()

    def seen(self) -> list[int]:
        """Return [signal, is time up, STOP exists, SAVE exists] as integers; a max-reduction combines the ranks'."""
        is_late = time.monotonic() - STARTED >= self._max_seconds
        files = [int(path.exists()) for path in self._files] or [0, 0]
        return [next(iter(_received), 0), int(is_late), *files]

    def request(self, number: int, is_late: int, to_stop: int, to_save: int) -> Request | None:
        """Return the ranks' combined request; request files are removed.

        The file STOP forbids a requeue, so it takes precedence over a signal.
        """
        for path, is_asking in zip(self._files, (to_stop, to_save), strict=False):
            if is_asking:  # a file created after `seen` counts at the next step
                path.unlink(missing_ok=True)
        if to_stop:
            return Request(DO_NOT_REQUEUE, "the file STOP")
        if number:
            return Request(SIGNALS[signal.Signals(number)], signal.Signals(number).name)
        if is_late:
            return Request(REQUEUE, "--run.max-minutes has elapsed")
        return Request(None, "the file SAVE") if to_save else None
