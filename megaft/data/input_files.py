"""Expand inputs to files: file names, folders (following links) and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megaft.base.errors import DataError


def _ignore(_: str) -> None:
    """Discard a message."""


def expand(inputs: Iterable[str | Path], tell: Callable[[str], None] = _ignore) -> list[Path]:
    """Return the files of the inputs: files, folders (recursively, without hidden files) and globs, each sorted.

    Links are followed; each folder is visited once. Empty files not named explicitly, such as Spark's _SUCCESS, are
    skipped.

    Args:
        inputs: Names of files and folders, and globs.
        tell: Called with a note on skipped empty files.

    Raises:
        DataError: An input matches no file, a link is broken, or a folder cannot be read.
    """
    files: dict[Path, None] = {}
    for name in map(str, inputs):
        paths = [Path(name)] if Path(name).is_file() else _non_empty(name, tell)
        if not paths:
            raise DataError(f"{name} matches no file; give a text or .jsonl file, a folder, or a quoted glob.")
        files |= dict.fromkeys(paths)
    return list(files)


def _non_empty(name: str, tell: Callable[[str], None]) -> list[Path]:
    paths = sorted(set(_matching(name)))
    empty = [path for path in paths if path.stat().st_size == 0]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        tell(f"note: skipped empty files of {name}: {empty[0]}{more}.")
    return [path for path in paths if path not in empty]


def _matching(name: str) -> Iterator[Path]:
    for path in [Path(name)] if Path(name).exists() else map(Path, glob.glob(name, recursive=True)):
        for file in _below(path) if path.is_dir() else [path]:
            if not file.exists():
                raise DataError(f"{file} is a link to {os.readlink(file)}, which does not exist; fix or remove it.")
            if file.is_file():
                yield file


def _below(folder: Path) -> Iterator[Path]:
    """Yield all non-hidden files below a folder, linked folders last, each folder once."""
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
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}; check its permissions, or leave it out."
    ) from error
