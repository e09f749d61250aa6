"""Disk faults: a process that dies between two of its changes, damaged files, no room."""

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
    """Fault that a rank injects right after one of its system calls that change checkpoints."""

    deed: Literal["list", "kill", "hang", "fill"]
    """Write down every call; get SIGKILL or SIGSTOP; or take all room on the disk."""
    folder: Path
    """RUN/checkpoints."""
    step: int
    """Calls count from the first one that names this step's checkpoint, until a later checkpoint is named."""
    at: int = 0
    """Number of the system call, from 0."""
    notes: Path = Path()
    """File that lists the calls, or that takes the room."""

    def begin(self) -> None:
        """Watch this process from here on."""
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
    """Counts the calls that belong to the save of one step, whichever thread makes them."""

    def __init__(self, sabotage: Sabotage, after: Callable[[int, str], None]) -> None:
        self.folder, self._step, self._after = str(sabotage.folder), sabotage.step, after
        self._count, self._is_active = 0, False

    def made(self, name: str, path: str) -> None:
        """Take a call that was just made."""
        if not path.startswith(self.folder):
            return
        for step in re.findall(r"step-(\d{8})", path):
            self._is_active = int(step) == self._step or (self._is_active and int(step) < self._step)
        if self._is_active:
            number, self._count = self._count, self._count + 1
            self._after(number, f"{name} {Path(path).name}")


def watch(calls: Calls) -> None:
    """Tell `calls` of everything that this process changes on a disk from here on."""

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

    io.open = open_watched  # what pathlib calls


def _path_of(target: Any, dir_fd: int | None = None, **_: Any) -> str:
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    return str(target) if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), target)


def fill(filler: Path, spare_bytes: int = 0) -> None:
    """Take all room of a file system but `spare_bytes`."""
    chunk = b"\0" * 4096
    descriptor = os.open(filler, os.O_WRONLY | os.O_CREAT)
    try:
        while shutil.disk_usage(filler.parent).free > spare_bytes:
            os.write(descriptor, chunk)
    except OSError:  # full, which was wanted
        pass
    finally:
        os.close(descriptor)


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """Mount a file system of 8 MB at `folder`; give the reason where that cannot be done."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if not mount or subprocess.run(command, capture_output=True).returncode:
        yield "mounting a small file system needs root"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def flip_bit(path: Path, random: Random) -> None:
    """Change one bit of a file, and what it says: the sixth bit would let a number in JSON have E for e."""
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(5)
    path.write_bytes(data)


def truncate(path: Path, random: Random) -> None:
    """Cut a file anywhere."""
    os.truncate(path, random.randrange(1, path.stat().st_size))


def empty(path: Path, random: Random) -> None:
    """Leave no byte of a file."""
    os.truncate(path, 0)


def remove(path: Path, random: Random) -> None:
    """Remove a file."""
    path.unlink()


def scribble(path: Path, random: Random) -> None:
    """Let a file hold something else."""
    path.write_bytes(random.randbytes(20))


def misname(path: Path, random: Random) -> None:
    """Let `latest` name what is not there."""
    path.write_text("step-00000999\n")
