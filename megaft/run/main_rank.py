"""State of the main rank as other ranks see it in the run's folder, before the process group exists."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from megaft.base.errors import CRASH, LostPeerError, UserError, kind_of
from megaft.base.lock import is_held
from megaft.run.events import recorded_end

MAX_SECONDS_BETWEEN_STARTS = 60
"""Maximum seconds between the starts of two ranks. The main rank removes files of earlier runs when it starts, so a
file that still exists after this time is from this run, even if it is older than this rank."""
SECONDS_BETWEEN_LOCK_CHECKS = 10
"""Checks are rare, since a check of a lock that no process holds takes it for an instant."""


class MainRank:
    """The main rank, as another rank sees it in the run's folder."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._launcher, self._began_waiting = os.getppid(), time.time()
        self._started = psutil.Process().create_time()
        self._next_lock_check = self._began_waiting
        self._held_lock = False

    def wrote(self, path: Path) -> bool:
        """Return True if the file exists and was written by this run."""
        try:
            written = path.stat().st_mtime
        except FileNotFoundError:
            return False
        return written >= self._started or time.time() >= self._began_waiting + MAX_SECONDS_BETWEEN_STARTS

    def require_alive(self) -> None:
        """Raise the main rank's error if it has failed, or LostPeerError if it is gone."""
        # Checked first, since the main rank records its reason before it releases the lock.
        is_gone = self._has_released_lock()
        if self.wrote(self._run_dir / "ended.json") and (end := recorded_end(self._run_dir)):
            raise _error(*end)
        if is_gone or os.getppid() != self._launcher:
            gone = "the main rank" if is_gone else "the launcher"
            raise LostPeerError(f"{gone} ended before the data of {self._run_dir} was prepared; start the ranks again.")

    def _has_released_lock(self) -> bool:
        if time.time() < self._next_lock_check:
            return False
        self._next_lock_check = time.time() + SECONDS_BETWEEN_LOCK_CHECKS
        is_now_held = is_held(self._run_dir)
        has_released = self._held_lock and not is_now_held
        self._held_lock = is_now_held
        return has_released


def _error(exit_code: int, reason: str) -> UserError:
    is_known = exit_code in {kind.exit_code for kind in UserError.__subclasses__()}
    return kind_of(exit_code if is_known else CRASH)(reason)
