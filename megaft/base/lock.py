"""Exclusive lock of a folder: one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from megaft.base.environment import job
from megaft.base.errors import ConfigError
from megaft.base.files import naming_disk_errors

LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


@contextmanager
def locked(folder: Path, is_main: bool = True, file: Path | None = None) -> Iterator[None]:
    """Hold a folder's lock during the block, exclusive among all processes on all machines that share the folder.

    The operating system releases the lock however the process ends. If the file system has no locks, a warning is
    printed on standard error and the block runs unlocked.

    Args:
        folder: The locked folder, named in messages; it is created if it does not exist.
        is_main: True for the one rank that holds the lock on behalf of all.
        file: The lock file, by default `lock` in the folder.

    Raises:
        ConfigError: Another process holds the lock (the message names it), or the file cannot be written.
    """
    if not is_main:
        yield
        return
    path = file or folder / "lock"
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def is_held(folder: Path) -> bool:
    """Return True if a process holds the folder's lock, or if the file system does not support locks."""
    try:
        descriptor = os.open(folder / "lock", os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # it exists, and this user may not read it
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # held (EWOULDBLOCK), or unsupported
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _acquire(folder: Path, path: Path) -> FileLock:
    lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed process
    try:
        lock.acquire(timeout=0.1, poll_interval=0.02)  # a holder may just be removing the file
    except Timeout as error:
        holder = path.read_text(errors="replace") or "a process that has just started"
        raise ConfigError(f"{folder} is in use by {holder}; wait until it ends, or choose another folder.") from error
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}); start no second job on {folder}.",
            file=sys.stderr,
        )
    holder = [f"{key} {value}" for key, value in job().items()] + [f"since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"]
    path.write_text(", ".join(holder))
    return lock
