"""Disk faults: a process that dies between two changes, damaged files, a full disk."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

CHANGES = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@dataclass(frozen=True, slots=True)
class Sabotage:
    """Fault that a rank injects right after one of its system calls that change a checkpoint."""

    deed: Literal["list", "kill", "hang", "fill"]
    """List every call; receive SIGKILL or SIGSTOP; or fill the disk."""
    folder: Path
    """RUN/checkpoints."""
    step: int
    """Calls are counted from the first that names this step's checkpoint until a later checkpoint is named."""
    at: int = 0
    """Number of the system call, from 0."""
    notes: Path = Path()
    """File that lists the calls, or that fills the disk."""

    def begin(self) -> None:
        """Start watching this process."""
        watch(Calls(self, self._after))

    def _after(self, number: int, what: str) -> None:
        if self.deed == "list":
            with io.FileIO(self.notes, "a") as file:
                file.write(f"{what}\n".encode())
        elif number != self.at:
            return
        elif self.deed == "fill":
            fill(self.notes)
        else:
            os.kill(os.getpid(), signal.SIGKILL if self.deed == "kill" else signal.SIGSTOP)


class Calls:
    """Counter of the calls that belong to the save of one step, over all threads."""

    def __init__(self, sabotage: Sabotage, after: Callable[[int, str], None]) -> None:
        self.folder, self._step, self._after = str(sabotage.folder), sabotage.step, after
        self._count, self._is_active = 0, False

    def made(self, name: str, path: str) -> None:
        """Count a call that was just made."""
        if not path.startswith(self.folder):
            return
        for step in re.findall(r"step-(\d{8})", path):
            self._is_active = int(step) == self._step or (self._is_active and int(step) < self._step)
        if self._is_active:
            number, self._count = self._count, self._count + 1
            self._after(number, f"{name} {Path(path).name}")


def watch(calls: Calls) -> None:
    """Report all further changes of this process to a disk to `calls`."""

    def watched(name: str) -> Callable[..., Any]:
        really = getattr(os, name)

        def call(target: Any, *arguments: Any, **keywords: Any) -> Any:
            result = really(target, *arguments, **keywords)
            calls.made(name, _path_of(arguments[0] if name in ("rename", "replace") else target, **keywords))
            return result

        return call

    for name in CHANGES:
        setattr(os, name, watched(name))

    class Watched(io.FileIO):
        def write(self, data: Any) -> int:
            written = super().write(data)
            calls.made("write", str(self.name))
            return written

    really_open = io.open

    def open_watched(path: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **keywords: Any) -> Any:
        if not {*mode} & {*"wxa"} or not str(path).startswith(calls.folder):
            return really_open(path, mode, buffering, *arguments, **keywords)
        raw = Watched(path, mode.replace("t", ""))
        calls.made("open", str(path))
        file = io.BufferedWriter(raw)
        return file if "b" in mode else io.TextIOWrapper(file, *arguments, **keywords)

    io.open = open_watched  # called by pathlib


def _path_of(target: Any, dir_fd: int | None = None, **_: Any) -> str:
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    return str(target) if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), target)


def fill(filler: Path, spare_bytes: int = 0) -> None:
    """Fill a file system except for `spare_bytes`."""
    chunk = b"\0" * 4096
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        while shutil.disk_usage(filler.parent).free > spare_bytes:
            os.write(descriptor, chunk)
    except OSError:  # full, as intended
        pass
    finally:
        os.close(descriptor)


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """Mount a file system of 8 MB at `folder`; yield the reason if that is impossible."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if not mount or subprocess.run(command, capture_output=True).returncode:
        yield "mounting a small file system needs root or user namespaces"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def flip_bit(path: Path, random: Random) -> None:
    """Flip one bit that changes the content: the sixth bit would only turn the e of a JSON number into E."""
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(5)
    path.write_bytes(data)


def truncate(path: Path, random: Random) -> None:
    """Truncate a file at a random position."""
    os.truncate(path, random.randrange(1, path.stat().st_size))


def empty(path: Path, random: Random) -> None:
    """Truncate a file to zero bytes."""
    os.truncate(path, 0)


def remove(path: Path, random: Random) -> None:
    """Remove a file."""
    path.unlink()


def scribble(path: Path, random: Random) -> None:
    """Overwrite a file with other content."""
    path.write_bytes(random.randbytes(20))


def misname(path: Path, random: Random) -> None:
    """Make `latest` name a checkpoint that does not exist."""
    path.write_text("step-00000999\n")
