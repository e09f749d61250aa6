"""Finished batches on disk, from which an interrupted evaluation continues."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megaft.base.files import naming_disk_errors

_HEADER = struct.Struct("<III")
"""Number of the batch, quantities, targets."""
_CHECKSUM = struct.Struct("<I")
"""CRC-32 of the header and of the values after it."""


class FinishedBatches:
    """Store of finished batches' nats: each rank appends to its own file; rank 0 reads the files of all ranks.

    A batch whose record is truncated or damaged is scored again.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.finished: dict[int, np.ndarray] = {}
        with naming_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.nats")) if rank == 0 else ():
                self.finished.update(_records(path.read_bytes()))
        self._path = folder / f"{rank:05d}-{time.time_ns()}.nats"

    def keep(self, number: int, values: np.ndarray) -> None:
        """Append a batch, Float32 of shape (quantities, targets)."""
        record = _HEADER.pack(number, *values.shape) + values.astype("<f4").tobytes()
        with naming_disk_errors(self._path), self._path.open("ab") as file:
            file.write(record + _CHECKSUM.pack(zlib.crc32(record)))


def _records(data: bytes) -> Iterator[tuple[int, np.ndarray]]:
    begin = 0
    while begin + _HEADER.size <= len(data):
        number, num_quantities, num_targets = _HEADER.unpack_from(data, begin)
        end = begin + _HEADER.size + 4 * num_quantities * num_targets
        record, checksum = data[begin:end], data[end : end + _CHECKSUM.size]
        if checksum != _CHECKSUM.pack(zlib.crc32(record)):
            return
        yield number, np.frombuffer(record, "<f4", offset=_HEADER.size).reshape(num_quantities, num_targets)
        begin = end + _CHECKSUM.size
