"""A safetensors file written once, synced, and hashed on the way: no second copy of the tensors, no second reading."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaft.weights.tensor_file import header_of

BYTES_AT_ONCE = 1 << 24


def write_shard(path: Path, pieces: list[tuple[str, Tensor]]) -> tuple[int, bytes]:
    """Write flat tensors as fp32 into a new safetensors file; return its bytes and SHA-256 once it is on disk.

    Args:
        path: There must be no such file.
        pieces: Tensors on any device, by the names they get.

    Raises:
        OSError: The disk refuses; nothing of the file is left.
    """
    sha256, begun = hashlib.sha256(), 0
    try:
        with path.open("xb") as file:
            for data in _buffers(pieces):
                file.write(data)
                sha256.update(data)
                if file.tell() - begun >= BYTES_AT_ONCE:
                    # Lets the disk begin, and memory go of what is there, so that the sync at the end has little to do.
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    begun = file.tell()
            num_bytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return num_bytes, sha256.digest()


def _buffers(pieces: list[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """Yield the file's parts; of a device's memory no more than a piece is on the host."""
    yield header_of({name: torch.Size([values.numel()]) for name, values in pieces}, torch.float32)
    for _, values in pieces:
        yield values.detach().to("cpu", torch.float32).view(torch.uint8).numpy().data
