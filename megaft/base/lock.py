"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from megaft.base.environment import job
from megaft.base.errors import ConfigError
from megaft.base.files import naming_disk_errors


@contextmanager
def locked(folder: Path, is_main: bool = True, file: Path | None = None) -> Iterator[None]:
    """Hold the lock of a folder in the block, against every process on any machine that sees the folder.

    The kernel lets go when the process dies, however it dies. Where a file system has no locks it says so and goes on.

    Args:
        folder: What is kept, in messages; it is made if it is not there.
        is_main: Whether this rank keeps it, which it does for all of its run's ranks.
        file: The lock file, by default `lock` in the folder.

    Raises:
        ConfigError: Another process has it; the message says which. Or the disk refuses.
    """
    if not is_main:
        yield
        return
    path = file or folder / "lock"
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(folder: Path, path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "a process that just began"
        os.close(descriptor)
        raise ConfigError(f"{folder} is in use by {holder}; wait until it ends, or name another folder.") from error
    except OSError as error:
        print(f"{path} cannot be locked ({error.strerror}): start no second job on {folder}.", file=sys.stderr)
    if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
        os.close(descriptor)  # the process before us has let go of it and removed it
        return _acquire(folder, path)
    holder = [f"{key} {value}" for key, value in job().items()] + [f"since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"]
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, ", ".join(holder).encode(), 0)
    return descriptor
