"""Memory-mapped token files in Megatron's .bin/.idx format.

Every document is one sequence. PREFIX.bin has the concatenated tokens of all documents. PREFIX.idx has the magic,
version (uint64), dtype code (uint8), number of sequences and of document indices (uint64 each), then lengths in
tokens (int32), offsets in bytes (int64) and document indices (int64): megatron/core/datasets/indexed_dataset.py.
Byte for byte the output of megatron-core's IndexedDatasetBuilder, reimplemented as importing that takes five seconds.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int64, Integer

from megaft.base.errors import DataError
from megaft.base.files import fsync

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\0\0"
_DTYPES = dict(enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), 1))
_UINT16_BELOW = 65_500  # ids, as in megatron-core's DType.optimal_dtype

Tokens = Integer[np.ndarray, " tokens"]


def idx_bytes(num_documents: int) -> int:
    """Return the length in bytes of the .idx file of this many documents."""
    return _HEADER.size + num_documents * (4 + 8) + (num_documents + 1) * 8


def with_suffix(prefix: str | Path, suffix: str) -> Path:
    """Append a suffix to the prefix; a dot in the prefix does not start a suffix."""
    return Path(f"{prefix}{suffix}")


class TokenFile:
    """A memory-mapped .bin/.idx pair.

    Attributes:
        dtype: Dtype of the tokens.
        num_tokens: Tokens of all documents.
        num_documents: Number of documents.
        document_offsets: First token of each document in the stream, followed by the length of the stream.
    """

    document_offsets: Int64[np.ndarray, " num_offsets"]

    def __init__(self, prefix: str | Path, vocab_size: int | None = None) -> None:
        """Open the pair. With `vocab_size`, reading a token outside the vocabulary is an error."""
        idx, data = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        for path in (idx, data):
            if not path.is_file():
                raise DataError(f"{path} does not exist; make it with megaft prepare.")
        self.dtype, lengths = _read_idx(idx)
        self.num_documents = len(lengths)
        self.document_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.num_tokens = int(self.document_offsets[-1])
        if data.stat().st_size != self.num_tokens * self.dtype.itemsize:
            raise DataError(
                f"{data} has {data.stat().st_size:,} bytes, but {idx} says {self.num_tokens:,} tokens of "
                f"{self.dtype.itemsize} bytes; run megaft prepare again."
            )
        is_empty = self.num_tokens == 0  # an empty file cannot be mapped
        self._tokens = np.zeros(0, self.dtype) if is_empty else np.memmap(data, self.dtype, mode="r")
        self._data, self._vocab_size = data, vocab_size

    def read(self, begin: int, end: int) -> Tokens:
        """Return tokens [begin, end) of the concatenated documents, as a view of the file.

        Raises:
            IndexError: The range is outside the stream.
            DataError: A token is outside the vocabulary; on a GPU it would be an unexplained crash.
        """
        if not 0 <= begin <= end <= self.num_tokens:
            raise IndexError(f"tokens {begin} to {end} of a stream of {self.num_tokens}")
        tokens = self._tokens[begin:end]
        if self._vocab_size is not None and tokens.max(initial=0) >= self._vocab_size:
            at = int(tokens.argmax())
            raise DataError(
                f"{self._data}, token {begin + at:,} is {tokens[at]}, but the vocabulary has {self._vocab_size}; "
                "run megaft prepare again."
            )
        return tokens


def _read_idx(path: Path) -> tuple[np.dtype, Int[np.ndarray, " documents"]]:
    data = np.fromfile(path, np.uint8)
    if len(data) < _HEADER.size:
        raise DataError(f"{path} has {len(data)} bytes, shorter than its header; run megaft prepare again.")
    magic, version, code, num_sequences, num_indices = _HEADER.unpack(data[: _HEADER.size].tobytes())
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise DataError(f"{path} is not a version 1 Megatron index; run megaft prepare again.")
    if num_indices != num_sequences + 1 or len(data) != idx_bytes(num_sequences):
        raise DataError(
            f"{path} has {len(data):,} bytes for {num_sequences:,} sequences in {num_indices - 1:,} documents; every "
            f"document must be one sequence ({idx_bytes(num_sequences):,} bytes). Run megaft prepare again."
        )
    return np.dtype(_DTYPES[code]), np.frombuffer(data, np.int32, num_sequences, _HEADER.size)


class TokenWriter:
    """Writes documents chunk by chunk and hashes the tokens. As a context manager, it closes its file at the end."""

    def __init__(self, bin_path: Path, *, cardinality: int | None) -> None:
        """Open `bin_path`. The dtype is Megatron's smallest for `cardinality` ids; None is for loss masks."""
        self.dtype = np.dtype("u1" if cardinality is None else "u2" if cardinality < _UINT16_BELOW else "i4")
        self._file = bin_path.open("wb")
        self._hash = hashlib.sha256()
        self._lengths = [0]

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, tokens: Tokens) -> None:
        """Append tokens to the current document."""
        data = tokens.astype(self.dtype, copy=False).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths[-1] += len(tokens)

    def end_document(self) -> None:
        """End the current document, which becomes one sequence.

        Raises:
            DataError: The document is longer than Megatron's format allows.
        """
        if self._lengths[-1] > np.iinfo(np.int32).max:
            raise DataError(
                f"a document has {self._lengths[-1]:,} tokens; Megatron's format allows {np.iinfo(np.int32).max:,}. "
                "Tokenize it with megaft prepare --unit document or line."
            )
        self._lengths.append(0)

    def close(self, idx_path: Path) -> str:
        """Write the index, flush both files to disk, and return the SHA-256 of the tokens."""
        lengths = np.array(self._lengths[:-1], np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        offsets = ends - lengths.astype(np.int64) * self.dtype.itemsize
        code = next(code for code, name in _DTYPES.items() if np.dtype(name) == self.dtype)
        header = _HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1)
        indices = np.arange(len(lengths) + 1, dtype=np.int64)
        idx_path.write_bytes(header + lengths.tobytes() + offsets.tobytes() + indices.tobytes())
        self._file.close()
        for path in (Path(self._file.name), idx_path):
            fsync(path)
        return self._hash.hexdigest()
