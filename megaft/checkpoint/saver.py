"""Atomic checkpoint saving: write to a temporary folder, hash, sync, and rename into place.

After the first checkpoint, a valid one exists at every moment: old checkpoints are removed only after the new one is in
place, and the leftovers of a killed save have a name that is never read.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaft
from megaft.base import parallel
from megaft.base.agreement import together
from megaft.base.environment import job
from megaft.base.errors import CheckpointError
from megaft.base.files import fsync, naming_disk_errors
from megaft.base.host_memory import available_memory
from megaft.checkpoint import engine_state
from megaft.checkpoint.run_state import Identity, RunState
from megaft.config.train import CheckpointConfig
from megaft.weights.manifest import FORMAT, MANIFEST, folder_of, manifest_text, published, require_size, step_of
from megaft.weights.tensor_file import write_shard

SPARE_BYTES = 1 << 20
"""Free space left for the manifest, headers and other files of the run."""
MAX_FILES, MIN_FILE_BYTES = 4, 1 << 28
"""Maximum number of files that a rank writes in parallel, each hashed by its own thread, and minimum size of each if
there are several."""
PINNED_FACTOR = 2
"""torch rounds page-locked memory up to a power of two."""

_naming_disk_errors = partial(
    naming_disk_errors,
    kind=CheckpointError,
    fix="Free space there or use another --run.dir; the last checkpoint stays, and the same command resumes from it.",
)


@dataclass(frozen=True, slots=True)
class PendingCheckpoint:
    """A checkpoint that is being written."""

    final: Path
    temporary: Path
    best_step: int | None
    manifest: dict[str, Any]
    """Manifest of the checkpoint without its `files` entry."""
    writers: list[Future[tuple[int, bytes]]]
    """Futures of the size in bytes and SHA-256 of each of this rank's files."""


class Saver:
    """Publishes the checkpoints of one run; all ranks call its methods together."""

    def __init__(self, run_dir: Path, identity: Identity, config: CheckpointConfig):
        self._run_dir, self._identity, self._config = run_dir, identity, config
        self._folder = run_dir / "checkpoints"
        self._threads = ThreadPoolExecutor(MAX_FILES, thread_name_prefix="checkpoint")
        self._pending: PendingCheckpoint | None = None
        self._host_copy = torch.empty(0)
        self.blocking_seconds = 0.0
        """Seconds for which the last save blocked training."""
        self.written_bytes = 0
        """Bytes of the last save's tensors, summed over all ranks."""

    @property
    def is_pending(self) -> bool:
        """True if a checkpoint has been started and not yet published."""
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """True if no checkpoint is pending, or this rank's files are all written or failed."""
        return self._pending is None or all(writer.done() for writer in self._pending.writers)

    def save(self, engine: Any, state: RunState) -> None:
        """Write and publish a checkpoint; in background mode, copy it to host memory and start writing it.

        If the host has no memory for the copy, training waits for the files, and only publishing is deferred.

        Raises:
            CheckpointError: The disk is full or cannot be written. Earlier checkpoints stay.
        """
        self.publish()
        began = time.perf_counter()
        pieces = [(f"{kind}/{name}@{offset}", values) for name, kind, offset, values in engine_state.collect(engine)]
        sizes = parallel.gather_numbers(
            [4 * sum(values.numel() for _, values in pieces), zlib.crc32(socket.gethostname().encode())]
        )
        self.written_bytes = sum(num_bytes for num_bytes, _ in sizes)
        final = folder_of(self._run_dir, state.step)
        temporary = final.with_name(final.name + ".tmp")
        together(self._begin, temporary)
        is_copied = self._config.in_background and self._fits(sizes)
        pieces = self._copied(pieces) if is_copied else pieces
        writers = [
            self._threads.submit(_write, temporary / _file_name(parallel.rank(), number), file_pieces)
            for number, file_pieces in enumerate(_split_into_files(pieces))
        ]
        self._pending = PendingCheckpoint(final, temporary, state.best_step, self._manifest(engine, state), writers)
        if self._config.in_background and not is_copied:
            wait(writers)
        self.blocking_seconds = time.perf_counter() - began
        if not self._config.in_background:
            self.publish()

    def _fits(self, sizes: list[list[int]]) -> bool:
        """Return True if this rank has its buffer already, or this host has memory for the copies of all its ranks."""
        rank_bytes, host = sizes[parallel.rank()]
        host_bytes = sum(num_bytes for num_bytes, other_host in sizes if other_host == host)
        return self._host_copy.nbytes >= rank_bytes or PINNED_FACTOR * host_bytes < available_memory()

    def _begin(self, temporary: Path) -> None:
        if not parallel.is_main():
            return
        with _naming_disk_errors(temporary):
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in (*self._folder.glob("*.tmp"), *self._folder.glob("*.old")):
                _remove(leftover)
            needed, free = self.written_bytes + SPARE_BYTES, shutil.disk_usage(self._folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, f"a checkpoint needs {needed:,} bytes, but {free:,} are free")
            temporary.mkdir()
            marker = {"step": step_of(temporary), **job()}
            (self._folder / "SAVING").write_text("".join(f"{key} {value}\n" for key, value in marker.items()))

    def _copied(self, pieces: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
        """Copy to a host buffer, which the next save reuses; it is page-locked if the source is a device."""
        lengths = [values.numel() for _, values in pieces]
        is_on_host, numel = all(values.is_cpu for _, values in pieces), sum(lengths)
        if self._host_copy.numel() < numel:
            self._host_copy = torch.empty(0)  # frees the smaller buffer first
            self._host_copy = torch.empty(numel, pin_memory=not is_on_host)
        copies = self._host_copy[:numel].split(lengths)
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
            "world_size": parallel.world_size(),
            "zero_stage": engine_state.stage(engine),
            **engine_state.sharding(engine),
            "shapes": engine_state.shapes(engine),
        }

    def publish(self) -> None:
        """Publish the pending checkpoint, if any: wait for every rank's files, rename it into place, remove old ones.

        Raises:
            CheckpointError: A rank could not write. Earlier checkpoints stay.
        """
        if self._pending is None:
            return
        began = time.perf_counter()
        pending, self._pending = self._pending, None
        try:
            written = together(lambda: [writer.result() for writer in pending.writers])
            written += [(0, bytes(32))] * (MAX_FILES - len(written))
            gathered = parallel.gather_numbers(
                [number for num_bytes, sha256 in written for number in (num_bytes, *sha256)]
            )
            together(self._finish, pending, gathered)
        except CheckpointError:
            if parallel.is_main():
                _remove(pending.temporary)
                (self._folder / "SAVING").unlink(missing_ok=True)
            raise
        self.blocking_seconds += time.perf_counter() - began

    def _finish(self, pending: PendingCheckpoint, written: list[list[int]]) -> None:
        if not parallel.is_main():
            return
        temporary, final = pending.temporary, pending.final
        with _naming_disk_errors(final):
            files = _files(written)
            for name, file in files.items():
                require_size(temporary / name, file["bytes"], "check that all ranks write to the same disk")
            _write_text(temporary / MANIFEST, manifest_text(pending.manifest | {"files": files}))
            fsync(temporary)
            if final.exists():  # the same step saved again after a resume: stays valid until the new one is in place
                final.rename(final.with_name(f"{final.name}.replaced-{time.time_ns()}"))
            temporary.rename(final)
            fsync(self._folder)
            _write_text(self._folder / "latest.tmp", final.name + "\n")
            (self._folder / "latest.tmp").replace(self._folder / "latest")
            fsync(self._folder)
            self._remove_old(step_of(final), pending.best_step)
            (self._folder / "SAVING").unlink(missing_ok=True)

    def _remove_old(self, newest: int, best_step: int | None) -> None:
        """Remove checkpoints beyond the retention rule, and those of later steps from before a rewind."""
        folders = {step_of(folder): folder for folder in published(self._folder)}
        steps = [step for step in folders if step <= newest]
        every = self._config.keep_every
        retained = {best_step, *steps[-self._config.keep_last :]}
        retained |= {step for step in steps if every and step % every == 0}
        for folder in published(self._folder):
            if folder != folders[step_of(folder)] or step_of(folder) not in retained:
                hidden = folder.with_name(folder.name + ".old")
                folder.rename(hidden)
                _remove(hidden)


def _file_name(rank: int, number: int) -> str:
    return f"rank-{rank:05d}{f'-{number}' if number else ''}.safetensors"


def _files(written: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Return the manifest's `files` entry from the sizes and SHA-256 hashes of every rank's files."""
    length = len(written[0]) // MAX_FILES
    files = {
        _file_name(rank, number): values[number * length : (number + 1) * length]
        for rank, values in enumerate(written)
        for number in range(MAX_FILES)
    }
    return {
        name: {"bytes": num_bytes, "sha256": bytes(sha256).hex()}
        for name, (num_bytes, *sha256) in files.items()
        if num_bytes
    }


def _split_into_files(pieces: list[tuple[str, Tensor]]) -> list[list[tuple[str, Tensor]]]:
    """Split this rank's tensors into up to MAX_FILES files of similar size, aiming at MIN_FILE_BYTES or more each."""
    num_bytes = 4 * sum(values.numel() for _, values in pieces)
    files = [[] for _ in range(min(MAX_FILES, max(1, num_bytes // MIN_FILE_BYTES)))]
    begin = 0
    for name, values in pieces:
        files[begin * len(files) // max(1, num_bytes)].append((name, values))
        begin += 4 * values.numel()
    return files


def _write(path: Path, pieces: list[tuple[str, Tensor]]) -> tuple[int, bytes]:
    with _naming_disk_errors(path):
        return write_shard(path, pieces)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
