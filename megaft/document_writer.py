"""Encoded pieces -> documents on disk: drops short ones, ends each, marks what is scored, and counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megaft.corpus import Piece
from megaft.indexed import Tokens, TokenWriter
from megaft.receipt import temporary


@dataclass(slots=True)
class Counts:
    """What was written; words and UTF-8 bytes are of the original text of the documents kept."""

    documents: int = 0
    documents_skipped: int = 0
    tokens: int = 0
    scored_tokens: int = 0
    words: int = 0
    bytes: int = 0


class DocumentWriter:
    """Writes PREFIX's temporary .bin/.idx, and with `has_mask` .scored.bin/.idx: 1 where a token is scored, else 0."""

    def __init__(self, prefix: Path, vocab_size: int, *, has_mask: bool, min_tokens: int, eod_id: int | None) -> None:
        self.counts = Counts()
        self._prefix, self._min_tokens, self._eod_id = prefix, min_tokens, eod_id
        self._tokens = TokenWriter(temporary(prefix, ".bin"), cardinality=vocab_size)
        self._mask = TokenWriter(temporary(prefix, ".scored.bin"), cardinality=None) if has_mask else None
        self._start_document()

    @property
    def dtype(self) -> np.dtype:
        """The type of the tokens on disk."""
        return self._tokens.dtype

    def add(self, piece: Piece, ids: Tokens) -> None:
        """Add the next piece of the document, and end it where the piece does."""
        self._held.append((ids, piece.is_scored))
        self._num_tokens += len(ids)
        self._num_words += piece.num_words
        self._num_bytes += piece.num_bytes
        if self._num_tokens >= self._min_tokens:
            self._write_held()
        if piece.ends_document:
            self._end_document()

    def close(self) -> str:
        """Write what remains through to the disk and return the SHA-256 of the tokens."""
        if self._mask:
            self._mask.close(temporary(self._prefix, ".scored.idx"))
        return self._tokens.close(temporary(self._prefix, ".idx"))

    def _start_document(self) -> None:
        # Held until the document is known to be long enough to keep.
        self._held: list[tuple[Tokens, bool]] = []
        self._num_tokens = self._num_words = self._num_bytes = 0

    def _write_held(self) -> None:
        for tokens, is_scored in self._held:
            self._write(tokens, is_scored)
        self._held = []

    def _write(self, tokens: Tokens, is_scored: bool) -> None:
        self._tokens.add(tokens)
        if self._mask:
            self._mask.add(np.full(len(tokens), is_scored, np.uint8))
        self.counts.tokens += len(tokens)
        self.counts.scored_tokens += len(tokens) * is_scored

    def _end_document(self) -> None:
        if self._num_tokens < self._min_tokens:
            self.counts.documents_skipped += 1
        else:
            if self._eod_id is not None:
                self._write(np.array([self._eod_id], self.dtype), True)
            for writer in filter(None, (self._tokens, self._mask)):
                writer.end_document()
            self.counts.documents += 1
            self.counts.words += self._num_words
            self.counts.bytes += self._num_bytes
        self._start_document()
