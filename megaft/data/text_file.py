"""Streaming reader of one input file: decompresses, validates, decodes, hashes and counts."""

from __future__ import annotations

import bz2
import codecs
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import zstandard

from megaft.base.errors import DataError
from megaft.config.prepare import ReadAs
from megaft.data.file_format import HEAD_BYTES, Format, compression_of, format_of, unsupported_format

BLOCK_BYTES = 1 << 13
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".bz2": bz2.BZ2Decompressor,
}
_DAMAGED = (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError)


class TextFile:
    """A UTF-8 text file, plain or compressed with gzip, zstd, xz or bzip2. Read it once, with `blocks` or `lines`.

    Attributes:
        num_bytes: Bytes read so far, as stored on disk.
        byte_order_marks: Byte order marks removed from the start of the file: 0 or 1.
        crlfs: Line endings changed from CRLF to LF.
        blank_records: Skipped records without text.
        first_blank: File and line of the first such record.
    """

    def __init__(self, path: Path, read_as: ReadAs = "auto") -> None:
        self.path = path
        self._read_as = read_as
        self.num_bytes = 0
        self.byte_order_marks = 0
        self.crlfs = 0
        self.blank_records = 0
        self.first_blank: str | None = None
        self._hash = hashlib.sha256()

    @cached_property
    def format(self) -> Format:
        """Format detected from the start of the file: text, JSON lines or a JSON array.

        Raises:
            DataError: The format is not supported; the message says how to convert it.
        """
        if self._read_as != "auto":
            return "text" if self._read_as == "text" else "lines"
        head = self._head()
        if (unsupported := unsupported_format(self.path, head)) is not None:
            description, fix = unsupported
            raise DataError(f"{self.path} is {description}; {fix}.")
        detected = format_of(self.path, head)
        if detected == "text" or detected == "lines" or detected == "array":
            return detected
        raise DataError(
            f"{self.path} is {detected}; write one record per line, such as with jq -c . (jq -c '.[]' for a list), "
            "or use megaft prepare --format text if the braces are part of the text."
        )

    def _head(self) -> bytes:
        head = b""
        for block in TextFile(self.path).content():
            head += block
            if len(head) >= HEAD_BYTES:
                break
        return head

    def receipt_entry(self) -> dict[str, str | int]:
        """Return the file's entry in the receipt. Call it after reading the whole file."""
        entry = {"path": str(self.path), "sha256": self._hash.hexdigest(), "bytes": self.num_bytes}
        return entry | {"format": self.format}

    def add_blank(self, where: str) -> None:
        """Count a record without text."""
        self.blank_records += 1
        self.first_blank = self.first_blank or where

    def lines(self) -> Iterator[str]:
        """Yield lines without their line endings. Only LF and CRLF end a line."""
        held: list[str] = []
        for block in self.blocks():
            first, *rest = block.split("\n")
            held.append(first)
            if rest:
                yield "".join(held)
                yield from rest[:-1]
                held = rest[-1:]
        if last := "".join(held):
            yield last

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of about BLOCK_BYTES bytes.

        Raises:
            DataError: The file is missing, empty, damaged or not UTF-8; the message has the line and byte offset.
        """
        held, offset, line = b"", 0, 1
        for block in chain(self.content(), [None]):
            data = held + (block or b"")
            if offset == 0:
                if block is not None and len(data) < len(codecs.BOM_UTF8):
                    held = data
                    continue
                offset = self.bom_length(data)
                data = data[offset:]
            text, used = self.decode(data, offset, line, final=block is None)
            if block is not None and text.endswith("\r"):  # perhaps half a CRLF
                text, used = text[:-1], used - 1
            held, offset, line = data[used:], offset + used, line + text.count("\n")
            if "\r" in text:
                self.crlfs += text.count("\r\n")
                text = text.replace("\r\n", "\n")
            if text:
                yield text
        if offset == 0:
            raise DataError(f"{self.path} is empty; give a file with text.")

    def bom_length(self, data: bytes) -> int:
        """Return the length of the UTF-8 byte order mark at the start of the file; DataError for UTF-16."""
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{self.path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8.")
        self.byte_order_marks = int(data.startswith(codecs.BOM_UTF8))
        return len(codecs.BOM_UTF8) * self.byte_order_marks

    def decode(self, data: bytes, offset: int, line: int, *, final: bool) -> tuple[str, int]:
        """Decode bytes at an offset and line of the file; return the text and the number of bytes used.

        Raises:
            DataError: The bytes are binary or not UTF-8, or the `final` bytes end inside a character.
        """
        at = data.find(b"\0")
        if at >= 0:
            fault = "a NUL byte: the file is binary or UTF-16; give UTF-8 text."
        else:
            try:
                return codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                at = error.start
                fault = f"{data[at]:#04x}, which is not UTF-8; convert the file, such as with iconv -f LATIN1 -t UTF-8."
        line += data.count(b"\n", 0, at)
        raise DataError(f"{self.path}, line {line}, byte offset {offset + at}, is {fault}")

    def _raw(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                while data := file.read(BLOCK_BYTES):
                    self._hash.update(data)
                    self.num_bytes += len(data)
                    yield data
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}; check its name and permissions.") from error

    def content(self) -> Iterator[bytes]:
        """Yield the file's bytes, decompressed. Use either this or `blocks`.

        Raises:
            DataError: The file is missing or damaged.
        """
        raw = self._raw()
        begin = next(raw, b"")
        suffix = compression_of(begin)
        if suffix is None:
            if begin and self.path.suffix.lower() in _DECOMPRESSORS:
                raise DataError(
                    f"{self.path} is damaged or not a {self.path.suffix} file; copy it again, or correct its name."
                )
            yield begin
            yield from raw
            return
        stream = None
        try:
            for data in chain([begin], raw):
                while data:
                    stream = stream or _DECOMPRESSORS[suffix]()
                    yield stream.decompress(data)
                    # A file may hold several concatenated compressed streams, with zero padding between them.
                    data, stream = (stream.unused_data.lstrip(b"\0"), None) if stream.eof else (b"", stream)
        except _DAMAGED as error:
            raise DataError(
                f"{self.path} is damaged or not a {suffix} file ({error}); copy it again, or correct its name."
            ) from error
        if stream is not None:
            raise DataError(f"{self.path} ends in the middle of its compressed data; copy it again.")
