"""Tokenizer quality on a text: round trip, bytes per token, tokens per word, vocabulary use."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from megaft.data.corpus import Chunk
from megaft.data.tokenizer import AnyTokenizer

BATCH = 1000
"""Texts tokenized at once."""
SHOWN = 60
"""Characters shown of a text that does not come back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatch:
    """The first place where the decoded tokens differ from the text."""

    where: str
    """File and line of its document."""
    text: str
    """The text from there on."""
    decoded: str


@dataclass(slots=True)
class Measures:
    """Counts over texts."""

    tokenizer: AnyTokenizer
    texts: int = 0
    """Documents, or parts of long ones."""
    changed_texts: int = 0
    """Texts that differ from their decoded tokens."""
    first_mismatch: Mismatch | None = None
    bytes: int = 0
    """UTF-8 bytes."""
    words: int = 0
    """Words, separated by white space."""
    whole_words: int = 0
    """Words that are one token."""
    uses: np.ndarray = field(init=False)
    """Occurrences of each entry of the vocabulary."""

    def __post_init__(self) -> None:
        self.uses = np.zeros(self.tokenizer.vocab_size, np.int64)

    def measure(self, chunks: Iterator[Chunk]) -> None:
        """Count all texts."""
        while batch := list(islice(chunks, BATCH)):
            texts = [chunk.text for chunk in batch]
            ids = self.tokenizer.encode_batch(texts)
            for chunk, decoded in zip(batch, self.tokenizer.decode_batch(ids), strict=True):
                self._compare(chunk, decoded)
            self.uses += np.bincount(
                np.concatenate([np.asarray(row, np.int64) for row in ids]), minlength=len(self.uses)
            )
            self._count_words(texts)

    def _compare(self, chunk: Chunk, decoded: str) -> None:
        self.texts += 1
        self.bytes += len(chunk.text.encode())
        if decoded == chunk.text:
            return
        self.changed_texts += 1
        if self.first_mismatch is None:
            pairs = enumerate(zip(chunk.text, decoded, strict=False))
            shorter = min(len(chunk.text), len(decoded))
            at = next((index for index, (left, right) in pairs if left != right), shorter)
            self.first_mismatch = Mismatch(
                where=chunk.where, text=chunk.text[at : at + SHOWN], decoded=decoded[at : at + SHOWN]
            )

    def _count_words(self, texts: Sequence[str]) -> None:
        words = Counter(word for text in texts for word in text.split())
        self.words += words.total()
        # Some tokenizers put a space before every text themselves.
        spaced = self.tokenizer.encode_batch([f" {word}" for word in words])
        plain = self.tokenizer.encode_batch(list(words))
        counts = zip(words.values(), spaced, plain, strict=True)
        self.whole_words += sum(count for count, *ids in counts if min(map(len, ids)) == 1)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return int(self.uses.sum())

    def results(self) -> dict[str, Any]:
        """Return the measures, as JSON values."""
        special, tokens = self.tokenizer.special_ids, max(self.tokens, 1)
        unknown_id = special["unk"] if special["unk"] not in (special["bos"], special["eos"]) else None
        used = np.flatnonzero(self.uses)
        single = sum(int(self.uses[id_]) for id_ in used if is_single_byte(self.tokenizer.piece(int(id_))))
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "sha256": self.tokenizer.sha256,
            "texts": self.texts,
            "changed_texts": self.changed_texts,
            "first_mismatch": None if self.first_mismatch is None else asdict(self.first_mismatch),
            "bytes": self.bytes,
            "words": self.words,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / tokens,
            "tokens_per_word": self.tokens / max(self.words, 1),
            "whole_words_share": self.whole_words / max(self.words, 1),
            "unknown_per_1000": 0.0 if unknown_id is None else 1000 * int(self.uses[unknown_id]) / tokens,
            "single_byte_share": single / tokens,
            "unused_entries": self.tokenizer.vocab_size - len(used),
        }


def is_single_byte(piece: str) -> bool:
    """Return True for an entry of one byte: a letter of the byte alphabet, or sentencepiece's <0x0A>."""
    return len(piece) == 1 or re.fullmatch(r"<0x[0-9A-F]{2}>", piece) is not None
