"""Available host memory, within the limits of a batch job or container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int:
    """Return the available bytes: Linux's estimate, or less if a control group's limit leaves less.

    Args:
        root: Parent folder of proc and sys.
    """
    information = (root / "proc/meminfo").read_text()
    available = 1024 * int(information.partition("MemAvailable:")[2].split()[0])
    return min([available, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left under each limit of this process's control groups; pages of files count as free."""
    for folder in _groups(root):
        for limit, usage in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            maximum, used = _number(folder / limit), _number(folder / usage)
            if maximum is not None and used is not None:
                yield maximum - used + _file_pages(folder / "memory.stat")


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory control groups (versions 1 and 2) and of their parents."""
    path = root / "proc/self/cgroup"
    for line in path.read_text().splitlines() if path.is_file() else ():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "memory"):
            top = root / "sys/fs/cgroup" / controllers
            inner = top / name.lstrip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents)


def _number(path: Path) -> int | None:
    """Return the number in a file; None if the file does not exist or contains "max"."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _file_pages(path: Path) -> int:
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))
