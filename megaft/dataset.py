"""Training samples: cutting, blending and shuffling.

Sample k of a run is a function of the seed and k alone: not of the number of steps, of ranks, or of resumes. A sample
is input tokens and their labels, a label being the next token, or IGNORE_INDEX where it is not scored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import count
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from megaft.errors import ConfigError
from megaft.indexed import TokenFile
from megaft.left_out import Ranges, whole_position
from megaft.loss import IGNORE_INDEX
from megaft.permutation import permute
from megaft.receipt import load_receipt
from megaft.scored_samples import holds_scored_token

BLOCK = 64
"""Samples after which each corpus of a blend has given its share, to within one or two."""

NOWHERE = np.zeros(0, np.int64)

PADDED_TO = 64
"""Samples of one document are padded to the longest of their micro batch, rounded up to this."""


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

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class _Tokens(ABC):
    """A prepared dataset, its tokens and which of them are scored, cut into samples.

    A sample without a scored token is left out: samples are numbered without them.
    """

    def __init__(self, prefix: str, context_length: int):
        receipt = load_receipt(prefix)
        self.sha256: str = receipt["bin_sha256"]
        self.num_opening = len(receipt.get("opening_ids", ()))
        self.context_length = context_length
        self.tokens = TokenFile(prefix, receipt["tokenizer"]["vocab_size"])
        self.scored = TokenFile(f"{prefix}.scored") if receipt["has_mask"] else None
        self.num_left_out = 0
        """Samples without a scored token, such as the first part of a prompt longer than the context."""
        self._num_whole = 0
        self._used: np.ndarray | None = None

    @abstractmethod
    def labels(self, sample: Any) -> tuple[Any, Any]:
        """Return the positions of samples' first labels and behind their last, those left out being numbered too."""

    def cut(self, num_whole: int, never: np.ndarray) -> None:
        """Number the samples; labels at the positions `never` are not scored, whatever the mask says."""
        self._num_whole = num_whole
        if self.num_opening >= self.context_length:  # else they do not fill a sample
            openings = self.tokens.document_offsets[:-1, None] + np.arange(self.num_opening)
            never = np.union1d(never, openings)
        if self.scored is not None or len(never) > 0:
            is_used = holds_scored_token(num_whole, self.context_length, self.labels, self.scored, never)
            self.num_left_out = num_whole - int(is_used.sum())
            self._used = np.flatnonzero(is_used) if self.num_left_out else None

    def __len__(self) -> int:
        return self._num_whole - self.num_left_out

    def range_of(self, index: int) -> tuple[int, int]:
        """Return the token range of a sample, its last label included."""
        begin, end = self.labels(index if self._used is None else self._used[index])
        return int(begin) - 1, int(end)

    def between(self, begin: int, end: int) -> Sample:
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


class Stream(_Tokens):
    """Packed samples: all documents concatenated and split every context_length tokens, across documents.

    Each token is a label once an epoch, except the first of the corpus and the special tokens that the tokenizer puts
    before each document.
    """

    def __init__(self, prefix: str, context_length: int, attend_within_documents: bool = False):
        super().__init__(prefix, context_length)
        self.attend_within_documents = attend_within_documents
        num_whole = math.ceil(max(0, self.tokens.num_tokens - 1) / context_length)
        # Nothing in a document's own context predicts its first token.
        self.cut(num_whole, np.unique(self.tokens.document_offsets[1:-1]) if attend_within_documents else NOWHERE)

    def labels(self, sample: Any) -> tuple[Any, Any]:
        """Return the positions of samples' first labels and behind their last."""
        begin = sample * self.context_length + 1
        return begin, np.minimum(begin + self.context_length, self.tokens.num_tokens)

    def __getitem__(self, index: int) -> Sample:
        begin, end = self.range_of(index)
        sample = self.between(begin, end)
        if not self.attend_within_documents:
            return sample
        documents = np.searchsorted(self.tokens.document_offsets, np.arange(begin, end), side="right")
        is_inside = documents[1:] == documents[:-1]
        return Sample(sample.input_ids, np.where(is_inside, sample.labels, IGNORE_INDEX), documents[:-1])


class Documents(_Tokens):
    """Unpacked samples: each document by itself, split into several where it is longer than the context."""

    def __init__(self, prefix: str, context_length: int):
        super().__init__(prefix, context_length)
        targets = np.diff(self.tokens.document_offsets) - 1
        pieces = -(-np.maximum(targets, 0) // context_length)
        self.first_sample = np.concatenate([[0], np.cumsum(pieces)])
        self.cut(int(self.first_sample[-1]), NOWHERE)

    def labels(self, sample: Any) -> tuple[Any, Any]:
        """Return the positions of samples' first labels and behind their last."""
        document = np.searchsorted(self.first_sample, sample, side="right") - 1
        offsets = self.tokens.document_offsets
        begin = offsets[document] + (sample - self.first_sample[document]) * self.context_length + 1
        return begin, np.minimum(begin + self.context_length, offsets[document + 1])

    def __getitem__(self, index: int) -> Sample:
        return self.between(*self.range_of(index))


class Samples:
    """The endless sequence of a run's samples: corpora blended by weight, each epoch of each in an order of its own."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], seed: int):
        assert len(corpora) == len(weights) > 0
        for corpus in corpora:
            if len(corpus) == 0:
                raise ConfigError("--data.train has a dataset without a single token to predict; give a longer text.")
        self.corpora = corpora
        self.seed = seed
        exact = [Fraction(weight) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        self._block = lru_cache(maxsize=4)(self._locate_block)
        self.by_share = sorted(range(len(exact)), key=lambda corpus: -exact[corpus])

    def __getitem__(self, position: int) -> Sample:
        corpus, number = self.locate(position)
        epoch, index = divmod(number, len(self.corpora[corpus]))
        chosen = self.corpora[corpus]
        return chosen[permute(index, len(chosen), self.seed, chosen.sha256, epoch)]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the corpus of the sample at `position`, and the number of earlier samples of that corpus.

        Both are known without a look at earlier blocks, from how many samples each corpus has given by a block's ends.
        """
        block, slot = divmod(position, BLOCK)
        return self._block(block)[slot]

    def _locate_block(self, block: int) -> list[tuple[int, int]]:
        before, after = self.taken(block * BLOCK), self.taken((block + 1) * BLOCK)
        unshuffled = [corpus for corpus, first in enumerate(before) for _ in range(after[corpus] - first)]
        corpora = [unshuffled[permute(slot, BLOCK, self.seed, "blend", block)] for slot in range(BLOCK)]
        numbers = [count(first) for first in before]
        return [(corpus, next(numbers[corpus])) for corpus in corpora]

    def taken(self, position: int) -> list[int]:
        """Return the number of samples of each corpus among the first `position`, a multiple of BLOCK.

        From the largest, each corpus takes its share of what is left, rounded, so that no count ever falls. (The
        differences of rounded cumulative weights, which are simpler, do fall where a weight is small.)
        """
        counts, left, weight_left = [0] * len(self.shares), position, Fraction(1)
        for corpus in self.by_share:
            counts[corpus] = math.floor(left * self.shares[corpus] / weight_left + Fraction(1, 2))
            left -= counts[corpus]
            weight_left -= self.shares[corpus]
        return counts

    @property
    def sha256(self) -> str:
        """Hash of the corpora and their shares, on which the order of samples depends besides the seed."""
        return " ".join(
            f"{corpus.sha256}:{len(corpus)}:{share}" for corpus, share in zip(self.corpora, self.shares, strict=True)
        )

    def num_steps(self, epochs: float, global_batch_size: int) -> int:
        """Return the number of steps in `epochs` passes over every corpus."""
        return max(1, math.ceil(epochs * sum(len(corpus) for corpus in self.corpora) / global_batch_size))


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro batch on one rank; rows are padded at the end with labels that are not scored."""

    input_ids: Int64[Tensor, "batch time"]
    labels: Int64[Tensor, "batch time"]
    document_ids: Int64[Tensor, "batch time"] | None
    num_tokens: int
    """Input tokens, without padding."""
    num_scored: int
    first_position: int

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the model's inputs on its device, copied from pinned memory without waiting for a GPU."""

        def moved(tensor: Tensor) -> Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        documents = None if self.document_ids is None else moved(self.document_ids)
        return moved(self.input_ids), moved(self.labels), documents


@dataclass(frozen=True, slots=True)
class Cut:
    """Split of the global batch over data-parallel ranks and micro-batches."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    rank: int
    num_ranks: int

    @property
    def global_batch_size(self) -> int:
        """Samples per step, over all ranks."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.num_ranks

    def first_positions(self, position: int) -> list[int]:
        """Return the first position of each of this rank's micro batches, in a step that begins at `position`.

        Piece m of rank r is number m * num_ranks + r of the global batch, so that with one micro-batch size the same
        pieces exist on any number of ranks.
        """
        pieces = range(self.rank, self.gradient_accumulation_steps * self.num_ranks, self.num_ranks)
        return [position + piece * self.micro_batch_size for piece in pieces]


def micro_batches(
    samples: Samples,
    position: int,
    left_out: Ranges,
    cut: Cut,
    padded_to: int | None,
    keep_documents: bool,
    longest: int | None = None,
) -> list[Batch]:
    """Return this rank's micro batches of a step.

    Args:
        samples: The run's samples.
        position: Samples taken by the steps before.
        left_out: Samples of the whole sequence that the run does without.
        cut: How the step's samples are dealt.
        padded_to: Row length; None pads to the longest sample, rounded up to a multiple of PADDED_TO.
        keep_documents: Whether the batch tells the model which tokens are of one document.
        longest: Largest row length that rounding up may give: the model has no positions beyond it.
    """
    batches = []
    for first in cut.first_positions(position):
        chosen = [whole_position(first + row, left_out) for row in range(cut.micro_batch_size)]
        batches.append(collate([samples[place] for place in chosen], chosen[0], padded_to, keep_documents, longest))
    return batches


def collate(
    rows: list[Sample], first_position: int, padded_to: int | None, keep_documents: bool, longest: int | None = None
) -> Batch:
    """Stack samples into a batch."""
    rounded = -(-max(len(row.input_ids) for row in rows) // PADDED_TO) * PADDED_TO
    length = padded_to or min(rounded, longest or rounded)

    def stack(arrays: list[np.ndarray], filler: int) -> Tensor:
        padded = np.full((len(arrays), length), filler, dtype=np.int64)
        for row, array in zip(padded, arrays, strict=True):
            row[: len(array)] = array
        return torch.from_numpy(padded)

    labels = stack([row.labels for row in rows], IGNORE_INDEX)
    return Batch(
        stack([row.input_ids for row in rows], 0),
        labels,
        stack([row.document_ids for row in rows], -1) if keep_documents else None,
        sum(len(row.input_ids) for row in rows),
        int((labels != IGNORE_INDEX).sum()),
        first_position,
    )
