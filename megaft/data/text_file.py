"""One input file read as a stream: decompressed, checked, decoded, hashed and counted on the way."""

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
    """A UTF-8 text file, or one compressed by gzip, zstd, xz or bzip2. Read it once, through `blocks` or `lines`.

    Attributes:
        num_bytes: Bytes of the file read so far, as they are on disk.
        byte_order_marks: Byte order marks removed from its beginning: 0 or 1.
        crlfs: Line ends changed from CRLF to LF.
        blank_records: Records without text, which are left out.
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
        """The format that the file's beginning shows: text, JSON lines or a JSON array.

        Raises:
            DataError: It is another, with the way out.
        """
        if self._read_as != "auto":
            return "text" if self._read_as == "text" else "lines"
        head = self._head()
        if (other := unsupported_format(self.path, head)) is not None:
            what, way_out = other
            raise DataError(f"{self.path} is {what}; {way_out}.")
        found = format_of(self.path, head)
        if found == "text" or found == "lines" or found == "array":
            return found
        raise DataError(
            f"{self.path} is {found}; write one record a line, such as with jq -c . (jq -c '.[]' for a list of them), "
            "or say --format text if its braces are the text."
        )

    def _head(self) -> bytes:
        head = b""
        for block in TextFile(self.path).content():
            head += block
            if len(head) >= HEAD_BYTES:
                break
        return head

    def record(self) -> dict[str, str | int]:
        """Return what a receipt says of the file, after the last of it was read."""
        read = {"path": str(self.path), "sha256": self._hash.hexdigest(), "bytes": self.num_bytes}
        return read | {"format": self.format}

    def add_blank(self, where: str) -> None:
        """Count a record without text."""
        self.blank_records += 1
        self.first_blank = self.first_blank or where

    def lines(self) -> Iterator[str]:
        """Yield lines without their line end. Only LF and CRLF end a line."""
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
            DataError: The file is missing, empty, damaged, UTF-16, binary, or not UTF-8; with the line and byte offset.
        """
        held, offset, line = b"", 0, 1
        for block in chain(self.content(), [None]):
            data = held + (block or b"")
            if offset == 0:
                if block is not None and len(data) < len(codecs.BOM_UTF8):
                    held = data
                    continue
                offset = self.mark_bytes(data)
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

    def mark_bytes(self, data: bytes) -> int:
        """Return the length of the byte order mark at the file's beginning; DataError where it is one of UTF-16."""
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{self.path} is UTF-16; convert it: iconv -f UTF-16 -t UTF-8.")
        self.byte_order_marks = int(data.startswith(codecs.BOM_UTF8))
        return len(codecs.BOM_UTF8) * self.byte_order_marks

    def decode(self, data: bytes, offset: int, line: int, *, final: bool) -> tuple[str, int]:
        """Return the text of bytes at an offset and line of the file, and how many were used: not half a character.

        Raises:
            DataError: They are binary or not UTF-8; or, where these are the `final` ones, end inside a character.
        """
        at = data.find(b"\0")
        if at >= 0:
            what = "a NUL byte: the file is binary or UTF-16; give UTF-8 text."
        else:
            try:
                return codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                at = error.start
                what = f"{data[at]:#04x}, which is not UTF-8; convert the file, such as with iconv -f LATIN1 -t UTF-8."
        line += data.count(b"\n", 0, at)
        raise DataError(f"{self.path}, line {line}, byte offset {offset + at}, is {what}")

    def _raw(self) -> Iterator[bytes]:
        try:
            with self.path.open("rb") as file:
                while data := file.read(BLOCK_BYTES):
                    self._hash.update(data)
                    self.num_bytes += len(data)
                    yield data
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error

    def content(self) -> Iterator[bytes]:
        """Yield the file's bytes, decompressed; read it by this or by `blocks`.

        Raises:
            DataError: The file is missing or damaged.
        """
        raw = self._raw()
        begin = next(raw, b"")
        suffix = compression_of(begin)
        if suffix is None:
            if begin and self.path.suffix.lower() in _DECOMPRESSORS:
                raise DataError(f"{self.path} is damaged or not a {self.path.suffix} file; its beginning is another's.")
            yield begin
            yield from raw
            return
        stream = None
        try:
            for data in chain([begin], raw):
                while data:
                    stream = stream or _DECOMPRESSORS[suffix]()
                    yield stream.decompress(data)
                    # A file may hold several compressed streams one after the other, with zeros between.
                    data, stream = (stream.unused_data.lstrip(b"\0"), None) if stream.eof else (b"", stream)
        except _DAMAGED as error:
            raise DataError(f"{self.path} is damaged or not a {suffix} file: {error}.") from error
        if stream is not None:
            raise DataError(f"{self.path} ends in the middle of its compressed data; copy it anew.")
