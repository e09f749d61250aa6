"""Expand inputs to files: files, folders with the folders linked in them, and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megaft.base.errors import DataError


def _nothing(_: str) -> None:
    """Say nothing."""


def expand(inputs: Iterable[str | Path], tell: Callable[[str], None] = _nothing) -> list[Path]:
    """Return the files that the inputs name: files, folders (all below them but hidden ones) and globs, sorted each.

    Links are followed, each folder once. An empty file that is not named itself, such as Spark's _SUCCESS, is left out.

    Args:
        inputs: Names.
        tell: Called with a note on empty files that are left out.

    Raises:
        DataError: An input names no file, a link leads nowhere, or a folder cannot be read.
    """
    files: dict[Path, None] = {}
    for name in map(str, inputs):
        found = [Path(name)] if Path(name).is_file() else _with_text(name, tell)
        if not found:
            raise DataError(f"{name} names no file; give a text or .jsonl file, a folder, or a quoted glob.")
        files |= dict.fromkeys(found)
    return list(files)


def _with_text(name: str, tell: Callable[[str], None]) -> list[Path]:
    found = sorted(set(_found(name)))
    empty = [path for path in found if path.stat().st_size == 0]
    if empty:
        others = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        tell(f"note: {empty[0]}{others} of {name} left out: empty.")
    return [path for path in found if path not in empty]


def _found(name: str) -> Iterator[Path]:
    for path in [Path(name)] if Path(name).exists() else map(Path, glob.glob(name, recursive=True)):
        for file in _below(path) if path.is_dir() else [path]:
            if not file.exists():
                raise DataError(f"{file} is a link to {os.readlink(file)}, which does not exist; mend or remove it.")
            if file.is_file():
                yield file


def _below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder but hidden ones; linked folders come after all others, and each folder once."""
    visited: set[str] = set()
    pending = [folder]
    while pending:
        links: list[Path] = []
        for top in pending:
            for parent, folders, files in os.walk(top, onerror=_refuse):
                if (real := os.path.realpath(parent)) in visited:
                    folders.clear()
                    continue
                visited.add(real)
                inner = [Path(parent, name) for name in sorted(folders) if not name.startswith(".")]
                links += [path for path in inner if path.is_symlink()]
                folders[:] = [path.name for path in inner if not path.is_symlink()]
                yield from (Path(parent, name) for name in files if not name.startswith("."))
        pending = sorted(links)


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
