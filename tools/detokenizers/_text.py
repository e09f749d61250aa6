"""Lossless conversion of bytes to text and back: bytes that are not UTF-8 become lone surrogates."""

import codecs
from collections.abc import Iterable, Iterator
from typing import BinaryIO

_CHUNK_BYTES = 2**16


def read(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of the file in chunks."""
    return iter(lambda: file.read(_CHUNK_BYTES), b"")


def decode(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of chunks of UTF-8, which may end inside a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def encode(text: str) -> bytes:
    """Return the bytes that `decode` turned into this text."""
    return text.encode("utf-8", "surrogateescape")
