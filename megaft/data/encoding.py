"""Tokenize chunks of documents, build their loss masks, and check the round trip."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from megaft.data.corpus import Chunk
from megaft.data.indexed import Tokens
from megaft.data.tokenizer import AnyTokenizer, Span

_BATCH_CHARACTERS = 1 << 21
_BATCHES_AHEAD = 8


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk with its tokens and loss mask."""

    chunk: Chunk
    ids: Tokens
    is_scored: Bool[np.ndarray, " tokens"]


class Encoder:
    """Tokenizes chunks in batches, ahead of the caller in a thread that does not hold the GIL.

    Attributes:
        is_lossless: True if decoding has reproduced the text of every chunk so far.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self.is_lossless = True
        self._tokenizer = tokenizer

    def __call__(self, chunks: Iterable[Chunk]) -> Iterator[list[EncodedChunk]]:
        """Yield batches of tokenized chunks."""
        queue: deque[Future[list[EncodedChunk]]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for batch in _batches(chunks):
                queue.append(pool.submit(self._encode, batch))
                if len(queue) > _BATCHES_AHEAD:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()

    def _encode(self, batch: list[Chunk]) -> list[EncodedChunk]:
        texts = [chunk.text for chunk in batch]
        if any(len(chunk.segments) > 1 for chunk in batch):
            encodings = self._tokenizer.encode_batch_with_spans(texts)
            ids = [ids for ids, _ in encodings]
            masks = [scored_tokens(chunk, spans) for chunk, (_, spans) in zip(batch, encodings, strict=True)]
        else:
            ids = self._tokenizer.encode_batch(texts)
            masks = [np.full(len(row), chunk.segments[0].is_scored) for chunk, row in zip(batch, ids, strict=True)]
        self._check(texts, ids)
        # Arrays, because the garbage collector would repeatedly traverse lists of millions of ids.
        arrays = [np.fromiter(row, np.int32, len(row)) for row in ids]
        return [EncodedChunk(*columns) for columns in zip(batch, arrays, masks, strict=True)]

    def _check(self, texts: list[str], ids: list[list[int]]) -> None:
        """Check the round trip until the first text that decoding does not reproduce."""
        if self.is_lossless and self._tokenizer.decode_batch(ids) != texts:
            self.is_lossless = False
            print("warning: the tokenizer is lossy: decoding does not reproduce the text.", file=sys.stderr)


def scored_tokens(chunk: Chunk, spans: list[Span]) -> Bool[np.ndarray, " tokens"]:
    """Return the loss mask of a chunk: tokens with at least one character of a scored segment.

    A token across a segment boundary is scored, as in transformers' `assistant_masks`; otherwise the first word of a
    completion might never be learned. (TRL counts the prompt's tokens separately instead.)

    Args:
        chunk: The text; its segments determine the scored characters.
        spans: Character span of each token. An empty span, such as that of a prefix space or of the first bytes of a
            character, is scored like the next character.
    """
    lengths = [len(segment.text) for segment in chunk.segments]
    is_scored = np.repeat([segment.is_scored for segment in chunk.segments], lengths)
    num_scored_before = np.concatenate([[0], np.cumsum(is_scored)])
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    begins = np.minimum(begins, len(is_scored) - 1)
    return num_scored_before[np.maximum(ends, begins + 1)] > num_scored_before[begins]


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    num_characters = 0
    for chunk in chunks:
        batch.append(chunk)
        num_characters += sum(len(segment.text) for segment in chunk.segments)
        if num_characters >= _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
