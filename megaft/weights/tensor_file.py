"""Read and write safetensors files one tensor at a time. Plain reads: touched pages of an mmap would stay resident.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaft.base.errors import DataError
from megaft.base.files import parse_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes by safetensors' names."""
BYTES_PER_FLUSH_HINT = 1 << 24
"""Bytes written between calls of posix_fadvise, which start writing to disk."""


class Span(NamedTuple):
    """Dtype, shape and byte range of a tensor in its file."""

    dtype: str
    shape: torch.Size
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A safetensors file with a parsed header."""

    path: Path
    spans: dict[str, Span]

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; DataError if it is not supported."""
        kind = self.spans[name].dtype
        if kind not in DTYPES:
            raise DataError(f"{self.path} stores {name} as {kind}; supported dtypes are {', '.join(DTYPES)}.")
        return DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """Return a tensor in new memory.

        Raises:
            DataError: The file cannot be read, or has been truncated.
        """
        _, shape, begin, end = self.spans[name]
        data = torch.empty(end - begin, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(begin)
                if file.readinto(data.numpy().data) < len(data):
                    raise OSError("it is shorter than its header says")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}; copy it again.") from error
        return data.view(self.dtype(name)).view(shape)


def open_tensors(path: Path) -> TensorFile:
    """Open a complete safetensors file: safetensors compares its header with its length.

    Raises:
        DataError: The file is truncated or damaged.
    """
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length))
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} is missing, truncated or damaged ({error}); copy it again.") from error
    header.pop("__metadata__", None)
    spans = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        spans[name] = Span(entry["dtype"], torch.Size(entry["shape"]), begin, end)
    return TensorFile(path, spans)


class TensorWriter:
    """Writer of a new safetensors file: the header first, then tensor after tensor, hashed on the way.

    An OSError while writing removes the file.
    """

    def __init__(self, path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self._sha256, self._num_bytes, self._num_released = hashlib.sha256(), 0, 0
        self._file = path.open("xb")
        self._put(header_of(shapes, dtype))

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor in the header's order, from any device."""
        self._put(tensor.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)

    def _put(self, data: bytes | memoryview) -> None:
        with self._removed_on_error():
            self._num_bytes += self._file.write(data)
            self._sha256.update(data)
            if self._num_bytes - self._num_released >= BYTES_PER_FLUSH_HINT and hasattr(os, "posix_fadvise"):
                # Start writing and drop written pages from the page cache, which leaves little for the final sync.
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                self._num_released = self._num_bytes

    def close(self) -> tuple[int, bytes]:
        """Flush the file to disk; return its size in bytes and SHA-256."""
        with self._removed_on_error():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self._num_bytes, self._sha256.digest()

    @contextmanager
    def _removed_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with suppress(OSError):
                self._file.close()
            self.path.unlink(missing_ok=True)
            raise


def write_shard(path: Path, tensors: list[tuple[str, Tensor]]) -> tuple[int, bytes]:
    """Write tensors as fp32 to a new safetensors file; return its size in bytes and SHA-256 once it is on disk.

    Raises:
        OSError: Writing failed, and the file was removed; or the file already exists, and is kept.
    """
    writer = TensorWriter(path, {name: tensor.shape for name, tensor in tensors}, torch.float32)
    for _, tensor in tensors:
        writer.write(tensor)
    return writer.close()


def header_of(shapes: dict[str, torch.Size], dtype: torch.dtype) -> bytes:
    """Return the header of a safetensors file of tensors in one dtype: the length of the JSON text, and the text."""
    kind = next(kind for kind, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + shape.numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
