"""Tokenize chunks of documents as whole strings, mark the tokens that are scored, and check the round trip."""

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
    """A chunk's tokens."""

    chunk: Chunk
    ids: Tokens
    is_scored: Bool[np.ndarray, " tokens"]


class Encoder:
    """Tokenizes chunks in batches, some of them ahead in a thread, without Python's lock, while the caller works.

    Attributes:
        is_lossless: Whether decoding gave back the text of every chunk tokenized so far.
    """

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self.is_lossless = True
        self._tokenizer = tokenizer

    def __call__(self, chunks: Iterable[Chunk]) -> Iterator[list[EncodedChunk]]:
        """Yield the chunks with their tokens, a batch at a time."""
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
            masks = [np.full(len(one), chunk.segments[0].is_scored) for chunk, one in zip(batch, ids, strict=True)]
        self._check(texts, ids)
        # Lists of millions of ids would be walked again and again by the garbage collector.
        arrays = [np.fromiter(one, np.int32, len(one)) for one in ids]
        return [EncodedChunk(*columns) for columns in zip(batch, arrays, masks, strict=True)]

    def _check(self, texts: list[str], ids: list[list[int]]) -> None:
        """Check the round trip, until the first text that does not come back."""
        if self.is_lossless and self._tokenizer.decode_batch(ids) != texts:
            self.is_lossless = False
            print("warning: the tokenizer loses text: decoding does not give it back.", file=sys.stderr)


def scored_tokens(chunk: Chunk, spans: list[Span]) -> Bool[np.ndarray, " tokens"]:
    """Return the mask of scored tokens: those with at least one character of a scored segment.

    A token across a border belongs to the scored side, as in the `assistant_masks` of transformers: unscored, a
    completion's first word would never be learnt. (TRL counts the tokens of the prompt by itself instead.)

    Args:
        chunk: Its segments say which characters are scored.
        spans: Where each token begins and ends in the chunk's text. One that covers no character, such as a space that
            the tokenizer puts before a text or the first bytes of a character, counts as the character that follows.
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
