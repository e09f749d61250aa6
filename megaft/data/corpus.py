"""Read documents from files: document boundaries, and the scored segments of each document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, pairwise
from typing import Literal

import numpy as np

from megaft.base.errors import DataError
from megaft.data.chat import Renderer, scored_contents
from megaft.data.record_file import records_of
from megaft.data.records import Record, Segment
from megaft.data.text_file import BLOCK_BYTES, TextFile

Unit = Literal["file", "line", "document"]

_IS_SPACE = np.array([byte < 128 and chr(byte).isspace() for byte in range(256)])
_WIDE_SPACES = [space for code in range(128, 0x3001) if (space := chr(code)).isspace()]


@dataclass(frozen=True, slots=True)
class RawDocument:
    """One document as stored in its file, before detokenization."""

    where: str
    """The file and line."""
    segments: Sequence[Segment]
    counted: Sequence[str]
    """Strings whose words and bytes count: the text, the completion, or the content of each scored turn."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document, detokenized, with the words (by `str.split`) and UTF-8 bytes of its original text.

    For a prompt and completion, the counts are the completion's; for a chat, those of its scored turns' contents.
    """

    segments: tuple[Segment, ...]
    num_words: int
    num_bytes: int
    where: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A document, or a part of one that can be tokenized on its own.

    The counts of a document's chunks add up to the document's.
    """

    segments: tuple[Segment, ...]
    num_words: int
    num_bytes: int
    ends_document: bool
    where: str

    @property
    def text(self) -> str:
        """Text tokenized as one string."""
        return self.segments[0].text if len(self.segments) == 1 else "".join(part.text for part in self.segments)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextLayout:
    """Rules for finding the documents of a file: unit, record keys, detokenizer and chat template."""

    unit: Unit = "file"
    text_key: str = "text"
    prompt_key: str | None = None
    completion_key: str | None = None
    messages_key: str | None = None
    detokenize: Callable[[str], str] | None = None
    """Detokenizer; None leaves the text unchanged."""
    render: Renderer | None = None
    """The tokenizer's chat template."""


def documents(source: TextFile, layout: TextLayout) -> Iterator[Document]:
    """Yield the non-blank documents of one file; count blank records in `source`.

    Raises:
        DataError: The file has no documents, or a record is invalid; the message names its line.
    """
    read = _texts if source.format == "text" else _records
    document = None
    for text in read(source, layout):
        if any(segment.text.strip() for segment in text.segments):
            document = _document(text, layout.detokenize)
            yield document
        elif source.format != "text":
            source.add_blank(text.where)
    if document is None:
        raise DataError(f"{source.path} holds only blank lines; give a file with text.")


def chunks(source: TextFile, layout: TextLayout, *, can_split: bool) -> Iterator[Chunk]:
    """Yield the documents of one file in chunks that are tokenized separately: whole documents unless `can_split`.

    Args:
        source: The file.
        layout: Layout of its documents.
        can_split: Split long texts at spaces (`Tokenizer.splits_at_spaces`). A file that is one document is then never
            held in memory as a whole, unless it has to be detokenized.

    Raises:
        DataError: As `documents`.
    """
    if can_split and source.format == "text" and layout.unit == "file" and layout.detokenize is None:
        yield from _streamed(source)
        return
    for document in documents(source, layout):
        yield from split_document(document, can_split=can_split)


def with_control_code(parts: Iterable[Chunk], code: str) -> Iterator[Chunk]:
    """Put an unscored control code and a space before each document's text; yield the chunks."""
    begins_document = True
    for chunk in parts:
        if begins_document:
            first, *rest = chunk.segments
            segments = (Segment(code, False), Segment(f" {first.text}", first.is_scored), *rest)
            chunk = replace(chunk, segments=segments)
        yield chunk
        begins_document = chunk.ends_document


def split_at_spaces(blocks: Iterable[str]) -> Iterator[str]:
    """Regroup a text's blocks to end before a space or newline that follows a non-space; yield no empty block."""
    held: list[str] = []
    for block in blocks:
        at = _last_split(block)
        if at:
            yield "".join([*held, block[:at]])
            held = []
        held.append(block[at:])
    if rest := "".join(held):
        yield rest


def _last_split(text: str) -> int:
    for at in range(len(text) - 1, 0, -1):
        if text[at] in " \n" and not text[at - 1].isspace():
            return at
    return 0


def _streamed(source: TextFile) -> Iterator[Chunk]:
    is_blank = True
    previous = ""
    for text in chain(split_at_spaces(source.blocks()), [None]):
        if previous:
            is_blank = is_blank and previous.isspace()
            yield Chunk((Segment(previous),), *count(previous), text is None, str(source.path))
        previous = text
    if is_blank:
        raise DataError(f"{source.path} holds only blank lines; give a file with text.")


def split_document(document: Document, *, can_split: bool) -> Iterator[Chunk]:
    """Yield a document in chunks of about BLOCK_BYTES if it can be split, otherwise as one chunk."""
    if can_split and sum(len(segment.text) for segment in document.segments) > BLOCK_BYTES:
        *first, last = _split_segments(document.segments)
    else:
        first, last = [], document.segments
    yield from (Chunk(segments, 0, 0, ends_document=False, where=document.where) for segments in first)
    yield Chunk(last, document.num_words, document.num_bytes, ends_document=True, where=document.where)


def _split_segments(segments: Sequence[Segment]) -> Iterator[tuple[Segment, ...]]:
    """Split the segments' concatenated text at spaces; yield the segments of each part."""
    text = "".join(segment.text for segment in segments)
    bounds = list(pairwise(accumulate((len(segment.text) for segment in segments), initial=0)))
    begin = 0
    for part in split_at_spaces(_slices(text)):
        end = begin + len(part)
        is_last = end == len(text)  # trailing empty segments belong to it
        yield tuple(
            Segment(text[max(begin, left) : min(end, right)], segment.is_scored)
            for segment, (left, right) in zip(segments, bounds, strict=True)
            if right > begin and (left < end or is_last)
        )
        begin = end


def _slices(text: str) -> Iterator[str]:
    return (text[begin : begin + BLOCK_BYTES] for begin in range(0, len(text), BLOCK_BYTES))


def _document(raw: RawDocument, detokenize: Callable[[str], str] | None) -> Document:
    counts = [count(counted) for counted in raw.counted]
    segments = raw.segments
    if detokenize is not None:
        segments = [Segment(detokenize(segment.text), segment.is_scored) for segment in segments]
    num_words, num_bytes = sum(words for words, _ in counts), sum(num_bytes for _, num_bytes in counts)
    return Document(tuple(segments), num_words, num_bytes, raw.where)


def count(text: str) -> tuple[int, int]:
    """Return the number of words, equal to len(text.split()), and of UTF-8 bytes, without building the words."""
    data = text.encode()
    if any(space in text for space in _WIDE_SPACES):
        return len(text.split()), len(data)
    is_space = _IS_SPACE[np.frombuffer(data, np.uint8)]
    begins = is_space[:-1] & ~is_space[1:]
    return int(np.count_nonzero(begins)) + int(len(data) > 0 and not is_space[0]), len(data)


def _texts(source: TextFile, layout: TextLayout) -> Iterator[RawDocument]:
    match layout.unit:
        case "file":
            yield _plain(str(source.path), "".join(source.blocks()))
        case "line":
            yield from (_plain(f"{source.path}, line {at}", line) for at, line in enumerate(source.lines(), 1))
        case "document":
            numbered = enumerate(source.lines(), 1)
            for is_blank, group in groupby(numbered, key=lambda line: not line[1].strip()):
                if not is_blank:
                    at, first = next(group)
                    yield _plain(f"{source.path}, line {at}", "\n".join([first, *(line for _, line in group)]))


def _plain(where: str, text: str) -> RawDocument:
    return RawDocument(where, [Segment(text)], [text])


def _records(source: TextFile, layout: TextLayout) -> Iterator[RawDocument]:
    return (_of_record(record, layout) for record in records_of(source))


def _of_record(record: Record, layout: TextLayout) -> RawDocument:
    if layout.messages_key is not None:
        assert layout.render is not None
        messages = record.get(layout.messages_key)
        segments = layout.render(record.where, layout.messages_key, messages)
        layout.render.count_tools(record)
        return RawDocument(record.where, segments, scored_contents(messages))
    if layout.prompt_key is not None and layout.completion_key is not None:
        prompt, completion = record.text(layout.prompt_key), record.text(layout.completion_key)
        return RawDocument(record.where, [Segment(prompt, False), Segment(completion)], [completion])
    return _plain(record.where, record.text(layout.text_key))
