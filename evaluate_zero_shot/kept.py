"""Finished batches on disk, so that a killed evaluation continues where it was."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megaft.files import naming_disk_errors

_HEADER = struct.Struct("<4sIIII")
"""Mark, number of the batch, quantities, targets, CRC-32 of the values."""
_MARK = b"nats"


class KeptBatches:
    """What batches have cost, in one folder a key: each rank appends to a file of its own, and any number may read.

    A record that was cut off or damaged is computed again.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.finished: dict[int, np.ndarray] = {}
        with naming_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.nats")):
                self.finished.update(_records(path.read_bytes()))
        self._path = folder / f"{rank:05d}-{time.time_ns()}.nats"

    def keep(self, number: int, values: np.ndarray) -> None:
        """Append a batch: Float32 "quantity targets"."""
        data = values.astype("<f4").tobytes()
        header = _HEADER.pack(_MARK, number, *values.shape, zlib.crc32(data))
        with naming_disk_errors(self._path), self._path.open("ab") as file:
            file.write(header + data)


def _records(data: bytes) -> Iterator[tuple[int, np.ndarray]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        mark, number, num_quantities, num_targets, checksum = _HEADER.unpack_from(data, offset)
        offset += _HEADER.size
        values = data[offset : offset + 4 * num_quantities * num_targets]
        if mark != _MARK or zlib.crc32(values) != checksum:
            return
        offset += len(values)
        yield number, np.frombuffer(values, "<f4").reshape(num_quantities, num_targets)
