"""Training samples of one prepared corpus: packed rows of equal length, or one document each.

A sample is input tokens and their labels: the next token, or IGNORE_INDEX if it is not scored.
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
"""Label of a token that is not scored."""

NO_POSITIONS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a micro batch."""

    input_ids: Int64[np.ndarray, " time"]
    labels: Int64[np.ndarray, " time"]
    document_ids: Int64[np.ndarray, " time"]


@runtime_checkable
class CorpusSamples(Protocol):
    """Indexed samples, each seen once per epoch. Every sample has a scored token."""

    sha256: str
    num_unscored_samples: int
    """Samples without a scored token, which have no index."""
    context_length: int
    """Maximum input tokens of a sample."""
    is_packed: bool
    """True if every sample but the last fills the context."""
    attend_within_documents: bool
    """True if attention and positions stay inside documents."""
    tokens: TokenFile
    """All tokens, and the document offsets."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class _DatasetSamples(ABC):
    """Samples of a prepared dataset, with its tokens and loss mask.

    Samples without a scored token get no index.
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
        self.num_unscored_samples = 0
        """Samples without a scored token, such as the first part of a prompt longer than the context."""
        self._num_all = 0
        self._used: np.ndarray | None = None

    @abstractmethod
    def label_range(self, sample: Any) -> tuple[Any, Any]:
        """Return the label range [begin, end) of samples, numbered with those that have no scored token."""

    def index_scored_samples(self, num_all: int, unscored: np.ndarray) -> None:
        """Index the samples that have a scored token; labels at positions `unscored` never count as scored."""
        self._num_all = num_all
        if self.num_opening >= self.context_length:  # otherwise they cannot fill a sample
            openings = self.tokens.document_offsets[:-1, None] + np.arange(self.num_opening)
            unscored = np.union1d(unscored, openings)
        if self.scored is not None or len(unscored) > 0:
            is_used = holds_scored_token(num_all, self.context_length, self.label_range, self.scored, unscored)
            self.num_unscored_samples = num_all - int(is_used.sum())
            self._used = np.flatnonzero(is_used) if self.num_unscored_samples else None

    def __len__(self) -> int:
        return self._num_all - self.num_unscored_samples

    def range_of(self, index: int) -> tuple[int, int]:
        """Return the token range [begin, end) of a sample, including its last label."""
        begin, end = self.label_range(index if self._used is None else self._used[index])
        return int(begin) - 1, int(end)

    def read(self, begin: int, end: int) -> Sample:
        """Return the sample of tokens [begin, end): inputs are all but the last token, labels all but the first."""
        tokens = self.tokens.read(begin, end).astype(np.int64)
        labels = tokens[1:]
        if self.scored is not None:
            labels = np.where(self.scored.read(begin, end)[1:] != 0, labels, IGNORE_INDEX)
        if self.num_opening:
            labels = np.where(self._is_opening(np.arange(begin + 1, end)), IGNORE_INDEX, labels)
        return Sample(tokens[:-1], labels, np.zeros_like(labels))

    def _is_opening(self, positions: Int64[np.ndarray, " time"]) -> Bool[np.ndarray, " time"]:
        """Return a mask of the opening tokens that preparation put before every document."""
        offsets = self.tokens.document_offsets
        return positions - offsets[np.searchsorted(offsets, positions, side="right") - 1] < self.num_opening


class PackedSamples(_DatasetSamples):
    """Packed samples: all documents concatenated and split every context_length tokens, across documents.

    Each token is a label once per epoch, except the first of the corpus and the opening tokens of each document.
    """

    is_packed = True

    def __init__(self, dataset: Dataset, context_length: int, attend_within_documents: bool = False):
        super().__init__(dataset, context_length)
        self.attend_within_documents = attend_within_documents
        num_all = math.ceil(max(0, self.tokens.num_tokens - 1) / context_length)
        # No token of a document comes before its first one to predict it.
        self.index_scored_samples(
            num_all, np.unique(self.tokens.document_offsets[1:-1]) if attend_within_documents else NO_POSITIONS
        )

    def label_range(self, sample: Any) -> tuple[Any, Any]:
        """Return the label range [begin, end) of samples."""
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
    """Unpacked samples: one document each; a document longer than the context is split into several."""

    def __init__(self, dataset: Dataset, context_length: int):
        super().__init__(dataset, context_length)
        targets = np.diff(self.tokens.document_offsets) - 1
        samples_of = -(-np.maximum(targets, 0) // context_length)
        self.first_sample = np.concatenate([[0], np.cumsum(samples_of)])
        self.index_scored_samples(int(self.first_sample[-1]), NO_POSITIONS)

    def label_range(self, sample: Any) -> tuple[Any, Any]:
        """Return the label range [begin, end) of samples."""
        document = np.searchsorted(self.first_sample, sample, side="right") - 1
        offsets = self.tokens.document_offsets
        begin = offsets[document] + (sample - self.first_sample[document]) * self.context_length + 1
        return begin, np.minimum(begin + self.context_length, offsets[document + 1])

    def __getitem__(self, index: int) -> Sample:
        return self.read(*self.range_of(index))
