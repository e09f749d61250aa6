"""Read and check the header of a GGUF file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from megaft.base.errors import DataError
from megaft.base.untrusted import MAX_LAYERS

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_ERRORS = (OSError, ValueError, LookupError, OverflowError, MemoryError, struct.error)


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Header of a GGUF file: settings of the architecture, and the sizes of the tensors."""

    architecture: str
    settings: dict[str, Any]
    """Metadata; the value of an array is None."""
    tensors: dict[str, int]
    """Number of elements of each tensor."""

    @property
    def num_elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(self.tensors.values())

    def setting(self, name: str) -> Any:
        """Return a setting of the architecture; None if absent."""
        return self.settings.get(f"{self.architecture}.{name}")


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file, every tensor of which lies inside the file.

    Raises:
        DataError: The file is truncated or damaged, or its number of layers does not match its tensors.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            header = _parse(_Reader(data))
    except _ERRORS as error:
        raise DataError(
            f"{path} is not a GGUF file, or it is truncated or damaged ({error}); copy it again."
        ) from error
    _require_layers(path, header)
    return header


class _Reader:
    """Sequential reader of GGUF values."""

    def __init__(self, data: mmap) -> None:
        self.data, self.position = data, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.position)
        self.position += struct.calcsize(f"<{kind}")
        return value

    def skip(self, num_bytes: int) -> None:
        if num_bytes > len(self.data) - self.position:
            raise ValueError("it ends too early")
        self.position += num_bytes

    def string(self) -> str:
        length = self.number("Q")
        self.skip(length)
        return self.data[self.position - length : self.position].decode()

    def value(self) -> Any:
        """Read a type and the value that follows it; None for an array."""
        kind = self.number("I")
        if kind == _ARRAY:
            return self._skip_array()
        return self.string() if kind == _STRING else self.number(_FORMATS[kind])

    def _skip_array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if kind != _STRING:
            self.skip(count * struct.calcsize(f"<{_FORMATS[kind]}"))
            return
        for _ in range(count):
            self.skip(self.number("Q"))


def _parse(reader: _Reader) -> GgufHeader:
    if reader.data[:4] != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    reader.skip(4)
    if (version := reader.number("I")) not in (2, 3):
        raise ValueError(f"its version is {version}; supported are 2 and 3")
    num_tensors, num_settings = reader.number("Q"), reader.number("Q")
    settings = _unique((reader.string(), reader.value()) for _ in range(num_settings))
    if not isinstance(architecture := settings.get("general.architecture"), str):
        raise ValueError("it has no general.architecture")
    spans = _unique((reader.string(), _span(reader)) for _ in range(num_tensors))
    _require_inside(reader, settings.get("general.alignment", _ALIGNMENT), spans)
    return GgufHeader(architecture, settings, {name: num_elements for name, (num_elements, *_) in spans.items()})


def _unique(pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"it has {name[:80]} twice")
        unique[name] = value
    return unique


def _span(reader: _Reader) -> tuple[int, int, int]:
    """Return a tensor's number of elements, number of bytes, and offset in the data."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    num_dimensions = reader.number("I")
    if num_dimensions > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor has {num_dimensions} dimensions")
    shape = [reader.number("Q") for _ in range(num_dimensions)]
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(reader.number("I"))]
    num_elements = math.prod(shape)
    if not num_elements or shape[0] % block_elements:
        raise ValueError(f"a tensor has the shape {shape[::-1]}")
    return num_elements, num_elements // block_elements * block_bytes, reader.number("Q")


def _require_inside(reader: _Reader, alignment: Any, spans: dict[str, tuple[int, int, int]]) -> None:
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}")
    begin = -(-reader.position // alignment) * alignment
    for name, (_, num_bytes, offset) in spans.items():
        if offset % alignment or begin + offset + num_bytes > len(reader.data):
            raise ValueError(f"{name[:80]} lies outside it")


def _require_layers(path: Path, header: GgufHeader) -> None:
    """Refuse a block_count that differs from the stored layers: transformers silently drops layers beyond it."""
    layers = header.setting("block_count")
    stored = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.(\d{1,9})\.", name))}
    if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise DataError(f"{path} has {header.architecture}.block_count {layers}; use 1 to {MAX_LAYERS:,} layers.")
    if stored != set(range(layers)):
        raise DataError(
            f"{path} has {header.architecture}.block_count {layers}, but tensors of {len(stored)} layers; "
            "copy the file again."
        )
