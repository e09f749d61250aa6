"""The records of a file: JSON lines, or one JSON array, read without holding more than a record."""

from __future__ import annotations

import json
from collections.abc import Iterator

from megaft.base.errors import DataError
from megaft.data.file_format import is_unfinished
from megaft.data.records import Record
from megaft.data.text_file import TextFile


def records_of(source: TextFile) -> Iterator[Record]:
    """Yield the records of a file of JSON lines, or of one JSON array; blank lines hold none.

    Raises:
        DataError: One is broken, with its line, or its number in the array.
    """
    texts = _array(source) if source.format == "array" else enumerate(source.lines(), 1)
    unit = "record" if source.format == "array" else "line"
    return (Record(f"{source.path}, {unit} {number}", text) for number, text in texts if text.strip())


def _array(source: TextFile) -> Iterator[tuple[int, str]]:
    blocks = source.blocks()
    text = next(blocks).lstrip()
    while not text:  # it begins with white space; `format` saw the bracket
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
                f"{source.path}: no comma or ] comes after record {number} of the array; write one record a line."
            )
        text = text[1:]
    if _skip_whitespace(text[1:], blocks):
        raise DataError(f"{source.path} goes on after its JSON array; write one record a line.")


def _skip_whitespace(text: str, blocks: Iterator[str]) -> str:
    """Return the text from its next character that is no white space, reading on for it; empty at the end."""
    while not (text := text.lstrip()):
        block = next(blocks, None)
        if block is None:
            break
        text = block
    return text


def _read_value(text: str, blocks: Iterator[str], where: str) -> tuple[int, str]:
    """Return the end of the value that a text begins with, and the text, read on as far as that takes."""
    decoder = json.JSONDecoder()
    text = _skip_whitespace(text, blocks)
    while True:
        try:
            return decoder.raw_decode(text)[1], text
        except json.JSONDecodeError as error:
            more = list(_read_at_least(len(text), blocks)) if is_unfinished(error) else []
            if not more:
                raise DataError(f"{where}: broken JSON ({error.msg}); the array holds one object each.") from error
            text += "".join(more)
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where} cannot be read: {error}.") from error


def _read_at_least(num_characters: int, blocks: Iterator[str]) -> Iterator[str]:
    """Yield blocks of so many characters together: a value that needs ever more is parsed a few times only."""
    for block in blocks:
        yield block
        num_characters -= len(block)
        if num_characters <= 0:
            return
