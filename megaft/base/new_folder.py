"""A new folder, which appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaft.base.checks import require
from megaft.base.errors import ConfigError
from megaft.base.files import fsync, naming_disk_errors


def require_new(flag: str, folder: Path) -> None:
    """Raise ConfigError if the folder, the value of `flag`, exists."""
    require(not os.path.lexists(folder), f"{flag} is {folder}, which already exists; give a new folder, or remove it.")


@contextmanager
def publishing_folder(flag: str, folder: Path, num_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary folder that is synced and renamed to `folder` at the end of the block, or removed on error.

    Args:
        flag: The flag whose value is the folder, for messages.
        folder: The folder to create.
        num_bytes: Bytes that must be available on its disk.

    Raises:
        ConfigError: The disk has no room or cannot be written, or `folder` exists by the end.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    with naming_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes:
            raise ConfigError(
                f"{flag} is {folder}, which needs {num_bytes:,} bytes, but only {free:,} are available; delete "
                "files there, or choose another disk."
            )
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            require_new(flag, folder)
            temporary.rename(folder)
            fsync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
