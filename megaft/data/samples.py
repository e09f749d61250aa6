"""Training samples of one prepared corpus, packed into rows of equal length or one document each.

A sample is input tokens and their labels, a label being the next token, or IGNORE_INDEX where it is not scored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int64

from megaft.data.dataset import Dataset
from megaft.data.indexed import TokenFile
from megaft.data.scored_samples import holds_scored_token

IGNORE_INDEX = -100
"""The label of a token that is not scored."""


NO_POSITIONS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a micro batch."""

    input_ids: Int64[np.ndarray, " time"]
    labels: Int64[np.ndarray, " time"]
    document_ids: Int64[np.ndarray, " time"]


@runtime_checkable
class Corpus(Protocol):
    """Samples by number, each seen once an epoch; every one holds a scored token."""

    sha256: str
    num_left_out: int
    """Samples without a scored token, which have no number."""
    context_length: int
    """Most input tokens of a sample."""
    is_packed: bool
    """True if every sample but the last fills the context."""
    attend_within_documents: bool
    """True if attention and positions are to stay inside documents."""
    tokens: TokenFile
    """All tokens, and where documents begin."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class _DatasetSamples(ABC):
    """A prepared dataset, its tokens and which of them are scored, cut into samples.

    A sample without a scored token is left out: samples are numbered without them.
    """

    is_packed = False
    attend_within_documents = False

    def __init__(self, dataset: Dataset, context_length: int):
        prefix, receipt = dataset.prefix, dataset.receipt
        self.sha256: str = receipt["bin_sha256"]
        self.num_opening = len(receipt.get("opening_ids", ()))
        self.context_length = context_length
        self.tokens = TokenFile(prefix, receipt["tokenizer"]["vocab_size"])
        self.scored = TokenFile(f"{prefix}.scored") if receipt["has_mask"] else None
        self.num_left_out = 0
        """Samples without a scored token, such as the first part of a prompt longer than the context."""
        self._num_before = 0
        self._used: np.ndarray | None = None

    @abstractmethod
    def labels(self, sample: Any) -> tuple[Any, Any]:
        """Return the positions of samples' first labels and behind their last, those left out being numbered too."""

    def number_samples(self, num_before: int, unscored: np.ndarray) -> None:
        """Number the samples; labels at the positions `unscored` are not scored, whatever the mask says."""
        self._num_before = num_before
        if self.num_opening >= self.context_length:  # else they do not fill a sample
            openings = self.tokens.document_offsets[:-1, None] + np.arange(self.num_opening)
            unscored = np.union1d(unscored, openings)
        if self.scored is not None or len(unscored) > 0:
            is_used = holds_scored_token(num_before, self.context_length, self.labels, self.scored, unscored)
            self.num_left_out = num_before - int(is_used.sum())
            self._used = np.flatnonzero(is_used) if self.num_left_out else None

    def __len__(self) -> int:
        return self._num_before - self.num_left_out

    def range_of(self, index: int) -> tuple[int, int]:
        """Return the token range of a sample, its last label included."""
        begin, end = self.labels(index if self._used is None else self._used[index])
        return int(begin) - 1, int(end)

    def read(self, begin: int, end: int) -> Sample:
        """Return the sample of tokens begin to end - 1: all but the last are inputs, all but the first labels."""
        tokens = self.tokens.read(begin, end).astype(np.int64)
        labels = tokens[1:]
        if self.scored is not None:
            labels = np.where(self.scored.read(begin, end)[1:] != 0, labels, IGNORE_INDEX)
        if self.num_opening:
            labels = np.where(self._is_opening(np.arange(begin + 1, end)), IGNORE_INDEX, labels)
        return Sample(tokens[:-1], labels, np.zeros_like(labels))

    def _is_opening(self, positions: Int64[np.ndarray, " time"]) -> Bool[np.ndarray, " time"]:
        """Return a mask of the special tokens that preparation put at the beginning of every document."""
        offsets = self.tokens.document_offsets
        return positions - offsets[np.searchsorted(offsets, positions, side="right") - 1] < self.num_opening


class PackedSamples(_DatasetSamples):
    """Packed samples: all documents concatenated and split every context_length tokens, across documents.

    Each token is a label once an epoch, except the first of the corpus and the special tokens that the tokenizer puts
    before each document.
    """

    is_packed = True

    def __init__(self, dataset: Dataset, context_length: int, attend_within_documents: bool = False):
        super().__init__(dataset, context_length)
        self.attend_within_documents = attend_within_documents
        num_before = math.ceil(max(0, self.tokens.num_tokens - 1) / context_length)
        # Nothing in a document's own context predicts its first token.
        self.number_samples(
            num_before, np.unique(self.tokens.document_offsets[1:-1]) if attend_within_documents else NO_POSITIONS
        )

    def labels(self, sample: Any) -> tuple[Any, Any]:
        """Return the positions of samples' first labels and behind their last."""
        begin = sample * self.context_length + 1
        return begin, np.minimum(begin + self.context_length, self.tokens.num_tokens)

    def __getitem__(self, index: int) -> Sample:
        begin, end = self.range_of(index)
        sample = self.read(begin, end)
        if not self.attend_within_documents:
            return sample
        documents = np.searchsorted(self.tokens.document_offsets, np.arange(begin, end), side="right")
        is_inside = documents[1:] == documents[:-1]
        return Sample(sample.input_ids, np.where(is_inside, sample.labels, IGNORE_INDEX), documents[:-1])


class DocumentSamples(_DatasetSamples):
    """Unpacked samples: each document by itself, split into several where it is longer than the context."""

    def __init__(self, dataset: Dataset, context_length: int):
        super().__init__(dataset, context_length)
        targets = np.diff(self.tokens.document_offsets) - 1
        pieces = -(-np.maximum(targets, 0) // context_length)
        self.first_sample = np.concatenate([[0], np.cumsum(pieces)])
        self.number_samples(int(self.first_sample[-1]), NO_POSITIONS)

    def labels(self, sample: Any) -> tuple[Any, Any]:
        """Return the positions of samples' first labels and behind their last."""
        document = np.searchsorted(self.first_sample, sample, side="right") - 1
        offsets = self.tokens.document_offsets
        begin = offsets[document] + (sample - self.first_sample[document]) * self.context_length + 1
        return begin, np.minimum(begin + self.context_length, offsets[document + 1])

    def __getitem__(self, index: int) -> Sample:
        return self.read(*self.range_of(index))
