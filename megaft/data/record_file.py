"""Streaming reader of the records of a JSON lines or JSON array file, one record in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megaft.base.errors import DataError
from megaft.data.file_format import is_unfinished
from megaft.data.records import Record
from megaft.data.text_file import TextFile


def records_of(source: TextFile) -> Iterator[Record]:
    """Yield the records of a file of JSON lines, or of one JSON array; skip blank lines.

    Raises:
        DataError: A record is invalid; the message names its line, or its number in the array.
    """
    texts = _array(source) if source.format == "array" else enumerate(source.lines(), 1)
    unit = "record" if source.format == "array" else "line"
    return (Record(f"{source.path}, {unit} {number}", text) for number, text in texts if text.strip())


def _array(source: TextFile) -> Iterator[tuple[int, str]]:
    blocks = source.blocks()
    text = next(blocks).lstrip()
    while not text:  # leading white space; `format` has seen the bracket
        text = next(blocks).lstrip()
    text, number = text.removeprefix("["), 0
    while True:
        number += 1
        end, text = _read_value(text, blocks, f"{source.path}, record {number}")
        yield number, text[:end]
        text = _skip_whitespace(text[end:], blocks)
        if text.startswith("]"):
            break
        if not text.startswith(","):
            raise DataError(
                f"{source.path}: record {number} of the array is not followed by a comma or ]; "
                "write one record per line."
            )
        text = text[1:]
    if _skip_whitespace(text[1:], blocks):
        raise DataError(f"{source.path} continues after its JSON array; write one record per line.")


def _skip_whitespace(text: str, blocks: Iterator[str]) -> str:
    """Return the text from its next non-space character, reading on as needed; empty at the end."""
    while not (text := text.lstrip()):
        block = next(blocks, None)
        if block is None:
            break
        text = block
    return text


def _read_value(text: str, blocks: Iterator[str], where: str) -> tuple[int, str]:
    """Return the end offset of the JSON value at the start of the text, and the text, extended as needed."""
    decoder = json.JSONDecoder()
    text = _skip_whitespace(text, blocks)
    while True:
        try:
            return decoder.raw_decode(text)[1], text
        except json.JSONDecodeError as error:
            more = list(_read_at_least(len(text), blocks)) if is_unfinished(error) else []
            if not more:
                raise DataError(f"{where}: broken JSON ({error.msg}); every record must be a JSON object.") from error
            text += "".join(more)
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where} cannot be read: {error}; correct or remove the record.") from error


def _read_at_least(num_characters: int, blocks: Iterator[str]) -> Iterator[str]:
    """Yield blocks of at least this many characters in total, so that a long value is parsed only a few times."""
    for block in blocks:
        yield block
        num_characters -= len(block)
        if num_characters <= 0:
            return
