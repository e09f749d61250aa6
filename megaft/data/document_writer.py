"""Write tokenized documents to disk: skip short ones, add opening and end tokens, store the loss mask, and count."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer

from megaft.data.encoding import EncodedChunk
from megaft.data.indexed import Tokens, TokenWriter
from megaft.data.receipt import temporary


@dataclass(slots=True)
class Counts:
    """Counts of a dataset. Words and UTF-8 bytes are those of the original text of the documents written.

    `documents_skipped` are too short; `documents_unscored` are written, but have no scored text of their own.
    `first_skipped` and `first_unscored` are the file and line of the first of each.
    """

    documents: int = 0
    documents_skipped: int = 0
    first_skipped: str | None = None
    documents_unscored: int = 0
    first_unscored: str | None = None
    tokens: int = 0
    scored_tokens: int = 0
    words: int = 0
    bytes: int = 0


class DocumentWriter:
    """Writer of a dataset's temporary files: the tokens and, with `has_mask`, a loss mask (1 for a scored token).

    As a context manager, it closes the files at the end, after an error too.
    """

    def __init__(
        self,
        prefix: Path,
        vocab_size: int,
        *,
        has_mask: bool,
        min_tokens: int,
        opening_ids: Sequence[int],
        eod_id: int | None,
    ) -> None:
        """Open the files.

        Args:
            prefix: Path of the dataset's files, without their suffixes.
            vocab_size: Number of token ids, which determines the integer dtype on disk.
            has_mask: Write the loss mask.
            min_tokens: Skip documents whose own text has fewer tokens.
            opening_ids: Special tokens put before each document, unless its text begins with them; never scored.
            eod_id: End-of-document token, scored if the document's last segment is; None appends no token.
        """
        self.counts = Counts()
        self._prefix, self._min_tokens, self._eod_id = prefix, min_tokens, eod_id
        with ExitStack() as files:
            self._tokens = files.enter_context(TokenWriter(temporary(prefix, ".bin"), cardinality=vocab_size))
            mask = TokenWriter(temporary(prefix, ".scored.bin"), cardinality=None) if has_mask else None
            self._mask = files.enter_context(mask) if mask else None
            self._files = files.pop_all()
        self._opening_ids = np.array(opening_ids, np.int32)
        self._start_document()

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the tokens on disk."""
        return self._tokens.dtype

    def add(self, encoded: EncodedChunk) -> None:
        """Add the next chunk of the document; end the document if the chunk ends it."""
        chunk, ids, is_scored = encoded.chunk, encoded.ids, encoded.is_scored
        if not self._is_open:
            ids, is_scored = self._open_document(ids, is_scored)
        self._buffer.append((ids, is_scored))
        self._has_scored_text = self._has_scored_text or bool(is_scored.any())
        self._num_tokens += len(ids)
        self._num_words += chunk.num_words
        self._num_bytes += chunk.num_bytes
        if self._num_tokens >= self._min_tokens:
            self._flush()
        if chunk.ends_document:
            self._end_document(chunk.where, is_end_scored=chunk.segments[-1].is_scored)

    def close(self) -> str:
        """Flush to disk and return the SHA-256 of the tokens."""
        if self._mask:
            self._mask.close(temporary(self._prefix, ".scored.idx"))
        return self._tokens.close(temporary(self._prefix, ".idx"))

    def _start_document(self) -> None:
        # Buffered until the document is known to be long enough.
        self._buffer: list[tuple[Tokens, Bool[np.ndarray, " tokens"]]] = []
        self._is_open = self._has_scored_text = False
        self._num_tokens = self._num_words = self._num_bytes = 0

    def _open_document(
        self, ids: Tokens, is_scored: Bool[np.ndarray, " tokens"]
    ) -> tuple[Integer[np.ndarray, " rest"], Bool[np.ndarray, " rest"]]:
        """Buffer the opening tokens and return the tokens after them; a text that begins with them gets them once."""
        self._is_open = True
        length = len(self._opening_ids)
        self._buffer.append((self._opening_ids, np.zeros(length, bool)))
        begins_with_them = np.array_equal(ids[:length], self._opening_ids)
        return (ids[length:], is_scored[length:]) if begins_with_them else (ids, is_scored)

    def _flush(self) -> None:
        for tokens, is_scored in self._buffer:
            self._write(tokens, is_scored)
        self._buffer = []

    def _write(self, tokens: Tokens, is_scored: Bool[np.ndarray, " tokens"]) -> None:
        self._tokens.add(tokens)
        if self._mask:
            self._mask.add(is_scored.astype(np.uint8))
        self.counts.tokens += len(tokens)
        self.counts.scored_tokens += int(is_scored.sum())

    def _end_document(self, where: str, *, is_end_scored: bool) -> None:
        counts = self.counts
        if self._num_tokens < self._min_tokens:
            counts.documents_skipped += 1
            counts.first_skipped = counts.first_skipped or where
        else:
            if not self._has_scored_text:
                counts.documents_unscored += 1
                counts.first_unscored = counts.first_unscored or where
            if self._eod_id is not None:
                self._write(np.array([self._eod_id], self.dtype), np.array([is_end_scored]))
            for writer in filter(None, (self._tokens, self._mask)):
                writer.end_document()
            counts.documents += 1
            counts.words += self._num_words
            counts.bytes += self._num_bytes
        self._start_document()
