"""Publishing checkpoints: written beside, hashed, synced, and renamed into place in one step.

No moment is without a valid checkpoint once there was one: the old ones go after the new one is in place, and what a
killed save leaves behind has a name that is never read.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaft
from megaft import engine_state, parallel
from megaft.checkpoint import FORMAT, MANIFEST, folder_of, manifest_text, published, require_size, step_of, together
from megaft.config import CheckpointConfig
from megaft.errors import CheckpointError
from megaft.events import job
from megaft.files import fsync
from megaft.run_state import Identity, RunState
from megaft.shard import write_shard

SPARE_BYTES = 1 << 20
"""For the manifest, the shards' headers and other files of the run."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A checkpoint that is being written."""

    final: Path
    temporary: Path
    best_step: int | None
    manifest: dict[str, Any]
    """All but its files."""
    writer: Future[tuple[int, bytes]]
    """Bytes and SHA-256 of this rank's file."""


class Saver:
    """Publishes the checkpoints of one run; all ranks call its methods together."""

    def __init__(self, run_dir: Path, identity: Identity, config: CheckpointConfig):
        self._run_dir, self._identity, self._config = run_dir, identity, config
        self._folder = run_dir / "checkpoints"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Pending | None = None
        self._host_copy = torch.empty(0)
        self.blocking_seconds = 0.0
        """How long the last save kept training waiting."""
        self.written_bytes = 0
        """Of the last save's tensors, over all ranks."""

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint was begun and is not published yet."""
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank's part of a pending checkpoint is on disk, or failed; true where none is pending."""
        return self._pending is None or self._pending.writer.done()

    def save(self, engine: Any, state: RunState) -> None:
        """Write a checkpoint and publish it; or, in the background, copy it to the host and begin to write it.

        Where the host has no memory for the copy, training waits for the file, and only publishing is put off.

        Raises:
            CheckpointError: The disk refuses, or has no room. The checkpoints before it stay.
        """
        self.publish()
        began = time.perf_counter()
        pieces = [(f"{kind}/{name}@{offset}", values) for name, kind, offset, values in engine_state.collect(engine)]
        num_bytes = 4 * sum(values.numel() for _, values in pieces)
        sizes = _gather([num_bytes, zlib.crc32(socket.gethostname().encode())])
        self.written_bytes = sum(size for size, _ in sizes)
        final = folder_of(self._run_dir, state.step)
        temporary = final.with_name(final.name + ".tmp")
        together(self._begin, temporary)
        here = sum(size for size, host in sizes if host == sizes[parallel.data_parallel_rank()][1])
        is_copied = self._config.in_background and (self._host_copy.nbytes >= num_bytes or here < available_memory())
        if is_copied:
            pieces = self._copied(pieces, num_bytes // 4)
        writer = self._thread.submit(_write, temporary / _file_name(parallel.data_parallel_rank()), pieces)
        self._pending = Pending(final, temporary, state.best_step, self._manifest(engine, state), writer)
        if self._config.in_background and not is_copied:
            writer.exception()  # waits
        self.blocking_seconds = time.perf_counter() - began
        if not self._config.in_background:
            self.publish()

    def _begin(self, temporary: Path) -> None:
        if not parallel.is_main():
            return
        with _refused(temporary):
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self._folder.glob("*.tmp"), *self._folder.glob("*.old")):
                _remove(leftover)
            needed, free = self.written_bytes + SPARE_BYTES, shutil.disk_usage(self._folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"{free:,} bytes are free, and it needs {needed:,}")
            temporary.mkdir()
            marker = {"step": step_of(temporary), **job()}
            (self._folder / "SAVING").write_text("".join(f"{key} {value}\n" for key, value in marker.items()))

    def _copied(self, pieces: list[tuple[str, Tensor]], numel: int) -> list[tuple[str, Tensor]]:
        """Copy to host memory, which is kept for the next save, as page-locked as the device can use."""
        is_on_host = all(values.is_cpu for _, values in pieces)
        if self._host_copy.numel() < numel:
            self._host_copy = torch.empty(0)  # before the larger one takes its place
            self._host_copy = torch.empty(numel, pin_memory=not is_on_host)
        copies = self._host_copy[:numel].split([values.numel() for _, values in pieces])
        for copy, (_, values) in zip(copies, pieces, strict=True):
            copy.copy_(values, non_blocking=True)
        if not is_on_host:
            torch.accelerator.synchronize()
        return [(name, copy) for copy, (name, _) in zip(copies, pieces, strict=True)]

    def _manifest(self, engine: Any, state: RunState) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "versions": {"megaft": megaft.__version__, "torch": torch.__version__, "deepspeed": version("deepspeed")},
            "state": asdict(state),
            "identity": asdict(self._identity),
            "loss_scale": engine_state.loss_scale_state(engine),
            "world_size": parallel.data_parallel_size(),
            "zero_stage": engine_state.stage(engine),
            "shapes": engine_state.shapes(engine),
        }

    def publish(self) -> None:
        """If one is pending, wait for every rank's part, make it a checkpoint, and remove older ones.

        Raises:
            CheckpointError: A rank could not write. The checkpoints before it stay.
        """
        if self._pending is None:
            return
        began = time.perf_counter()
        pending, self._pending = self._pending, None
        try:
            num_bytes, sha256 = together(pending.writer.result)
            parts = _gather([num_bytes, *sha256])
            together(self._finish, pending, parts)
        except CheckpointError:
            if parallel.is_main():
                _remove(pending.temporary)
                (self._folder / "SAVING").unlink(missing_ok=True)
            raise
        self.blocking_seconds += time.perf_counter() - began

    def _finish(self, pending: Pending, parts: list[list[int]]) -> None:
        if not parallel.is_main():
            return
        temporary, final = pending.temporary, pending.final
        with _refused(final):
            files = {}
            for rank, (num_bytes, *sha256) in enumerate(parts):
                require_size(temporary / _file_name(rank), num_bytes)
                files[_file_name(rank)] = {"bytes": num_bytes, "sha256": bytes(sha256).hex()}
            _write_text(temporary / MANIFEST, manifest_text(pending.manifest | {"files": files}))
            fsync(temporary)
            if final.exists():  # the same step, saved again after a resume: until the new one is there it counts
                final.rename(final.with_name(f"{final.name}.replaced-{time.time_ns()}"))
            temporary.rename(final)
            fsync(self._folder)
            _write_text(self._folder / "latest.tmp", final.name + "\n")
            (self._folder / "latest.tmp").replace(self._folder / "latest")
            fsync(self._folder)
            self._remove_old(step_of(final), pending.best_step)
            (self._folder / "SAVING").unlink(missing_ok=True)

    def _remove_old(self, newest: int, best_step: int | None) -> None:
        """Remove what is not to be kept, which is also what the run left behind when it went back before it."""
        folders = {step_of(folder): folder for folder in published(self._folder)}
        steps = [step for step in folders if step <= newest]
        every = self._config.keep_every
        kept = {best_step, *steps[-self._config.keep_last :], *(step for step in steps if every and step % every == 0)}
        for folder in published(self._folder):
            if folder != folders[step_of(folder)] or step_of(folder) not in kept:
                hidden = folder.with_name(folder.name + ".old")
                folder.rename(hidden)
                _remove(hidden)


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _write(path: Path, pieces: list[tuple[str, Tensor]]) -> tuple[int, bytes]:
    with _refused(path):
        return write_shard(path, pieces)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn what the disk refuses inside the block into a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error.strerror}. Free space there or name another --run.dir; "
            "the last checkpoint stays, and the same command continues from it."
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _gather(mine: list[int]) -> list[list[int]]:
    """Return the numbers, none negative, of every rank in order."""
    rank, size = parallel.data_parallel_rank(), parallel.data_parallel_size()
    flat = parallel.max_over_ranks([number if rank == r else 0 for r in range(size) for number in mine])
    return [flat[begin : begin + len(mine)] for begin in range(0, len(flat), len(mine))]


def available_memory() -> int:
    """Return the bytes that this host's processes can still take, as Linux estimates them."""
    information = Path("/proc/meminfo").read_text()
    return 1024 * int(information.partition("MemAvailable:")[2].split()[0])
