"""Sliding-window scoring of a text: nats of every token, and perplexities. Training validates with it too.

Windows never cross documents. Batches are formed over the whole text and distributed round-robin over the data-parallel
ranks. The nats of each token are stored at its position in one array, and the sum runs over that array, so the score is
the same on any number of ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from megaft.base import parallel
from megaft.base.errors import DataError
from megaft.base.plural import counted
from megaft.data.samples import IGNORE_INDEX
from megaft.models.finite import require_finite_nats
from megaft.scoring.batch import ScoringBatch
from megaft.scoring.host_copy import HostCopy
from megaft.scoring.windows import Window

T = TypeVar("T")

TokenScorer = Callable[[ScoringBatch], Tensor]
"""The model, in evaluation mode, from a batch to Float32 "quantity scored", row by row.

The first quantity is the nats of each scored label; the optional second is 1.0 if it was the model's greedy choice.
"""

IN_FLIGHT = {"cpu": 0, "cuda": 1}
"""Batches that the host launches before it waits for the values of an earlier one, by device type."""


@dataclass(frozen=True, slots=True)
class Score:
    """Negative log-likelihood of a text, and the results derived from it.

    Nats are finite. A perplexity is inf if it overflows a float, as the word perplexity of 10,000 tokens without white
    space, which are a single word.
    """

    nats: float
    num_scored_tokens: int
    num_words: int | None = None
    """Words of the original text, before any detokenizing."""
    num_bytes: int | None = None
    """UTF-8 bytes of the original text."""
    token_nats: Float64[np.ndarray, " tokens"] | None = field(default=None, repr=False, compare=False)
    """Nats of each token of the text, in order; 0.0 if a token is not scored."""
    is_greedy: Bool[np.ndarray, " tokens"] | None = field(default=None, repr=False, compare=False)
    """True at scored tokens that were the model's greedy choice (argmax)."""

    def of(self, is_scored: Bool[np.ndarray, " tokens"]) -> Score:
        """Return the score of some of the text's tokens, without word and byte counts."""
        assert self.token_nats is not None
        return Score(math.fsum(self.token_nats[is_scored]), int(is_scored.sum()))

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-likelihood, as training reports it."""
        return self.nats / self.num_scored_tokens

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens); comparable within one tokenizer only."""
        return exp(self.nats_per_token)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words); None if the number of words is unknown."""
        return exp(self.nats / self.num_words) if self.num_words else None

    @property
    def byte_perplexity(self) -> float | None:
        """exp(nats / bytes); None if the number of bytes is unknown."""
        return exp(self.nats / self.num_bytes) if self.num_bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """Nats / (ln 2 * bytes); None if the number of bytes is unknown."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else None

    def as_dict(self) -> dict[str, float]:
        """Return every known quantity by name, for the metrics file."""
        names = ("nats", "num_scored_tokens", "nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def exp(nats: float) -> float:
    """Return exp(nats); inf if that overflows a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@runtime_checkable
class Documents(Protocol):
    """A tokenized text: document d is read(document_offsets[d], document_offsets[d + 1])."""

    document_offsets: np.ndarray

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return tokens [begin, end) of the text."""
        ...


class Row(NamedTuple):
    """A window of a document; its position p is token first + p of the text.

    With a prefix token, `first` is one before the document, so position 0 is the prefix.
    """

    first: int
    window: Window

    @property
    def target_positions(self) -> slice:
        """Positions of the targets in the text."""
        return slice(self.first + self.window.scored_from, self.first + self.window.end)

    @property
    def num_inputs(self) -> int:
        """Columns that the row needs in a batch."""
        return self.window.end - self.window.begin - 1

    @property
    def num_targets(self) -> int:
        """Tokens that the row scores."""
        return self.window.end - self.window.scored_from


def rows_of(
    documents: Documents,
    split: Callable[[int], Iterable[Window]],
    *,
    prefix_id: int | None = None,
    eod_id: int | None = None,
) -> list[Row]:
    """Split every document into windows.

    Args:
        documents: The text.
        split: Returns the windows of a number of tokens, such as `windows`.
        prefix_id: Token put before each document so that its first token is scored; None leaves that token unscored.
        eod_id: End-of-document token that data preparation appended; not scored at the end of a document.
    """
    rows = []
    for begin, end in pairwise(map(int, documents.document_offsets)):
        if end > begin and eod_id is not None and documents.read(end - 1, end)[0] == eod_id:
            end -= 1
        first = begin if prefix_id is None else begin - 1
        rows += [Row(first, window) for window in split(end - first)]
    return rows


class Batch(NamedTuple):
    """Rows of one forward pass."""

    rows: list[Row]
    num_columns: int
    """Input tokens of each row, including padding."""


def batches_of(
    rows: Sequence[Row], tokens_per_batch: int, device_type: str, rope_length_limit: int | None = None
) -> list[Batch]:
    """Group rows of one shape class into batches, the longest first, so that there is little padding.

    Batches depend on the rows and the device type, not on the number of ranks, so the computed bits do not either. On
    CUDA lengths are rounded up, so that many batches share a shape: cuDNN plans each new one, for some 30 ms.

    Args:
        rows: In any order.
        tokens_per_batch: Largest number of input tokens in a batch, including padding; a longer row is its own batch.
        device_type: Type of the model's device.
        rope_length_limit: Rows up to this length never share a batch with longer rows (see rope.length_limit).
    """

    def shape_class(row: Row) -> tuple[int, bool]:
        # Rows of one class share a batch. The last layer and the head compute as many columns as its most targets.
        return row.num_targets.bit_length(), is_longer(row)

    def is_longer(row: Row) -> bool:
        return rope_length_limit is not None and row.num_inputs > rope_length_limit

    def order(row: Row) -> tuple[int, bool, int]:
        columns, is_longer = shape_class(row)
        return -columns, not is_longer, -row.num_inputs

    def padded_length(row: Row) -> int:
        if device_type != "cuda":
            return row.num_inputs
        limit = longest if rope_length_limit is None or is_longer(row) else min(longest, rope_length_limit)
        return min(rounded_length(row.num_inputs), limit)

    batches = []
    longest = max((row.num_inputs for row in rows), default=1)  # the model may have no more positions
    for _, similar in groupby(sorted(rows, key=order), shape_class):
        group = list(similar)
        while group:
            num_columns = padded_length(group[0])
            num_rows = max(1, tokens_per_batch // num_columns)
            batches.append(Batch(group[:num_rows], num_columns))
            group = group[num_rows:]
    return batches


def rounded_length(length: int) -> int:
    """Return a length rounded up to a multiple of 8, and to one of eight between any two powers of two."""
    multiple = 1 << max(3, (length - 1).bit_length() - 4)
    return -(-length // multiple) * multiple


@runtime_checkable
class BatchStore(Protocol):
    """Store of finished batches, from which an interrupted evaluation resumes."""

    finished: dict[int, np.ndarray]
    """Float32 "quantity targets" of an earlier evaluation by batch number; only the main rank's are used."""

    def keep(self, number: int, values: np.ndarray) -> None:
        """Store a batch's values, in the order of its rows and their targets."""
        ...


def score(
    documents: Documents,
    rows: Sequence[Row],
    model: TokenScorer,
    *,
    tokens_per_batch: int,
    device: torch.device,
    prefix_id: int | None = None,
    num_words: int | None = None,
    num_bytes: int | None = None,
    is_included: Bool[np.ndarray, " tokens"] | None = None,
    name: str = "the text",
    store: BatchStore | None = None,
    rope_length_limit: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Score:
    """Score a text on all data-parallel ranks together; each returns the same bits, whatever their number.

    Every rank makes the same number of forward passes, because under ZeRO-3 an uneven number hangs. A rank without a
    batch passes one token with nothing to score.

    Args:
        documents: The text; its tokens are read as they are needed.
        rows: Its windows, from `rows_of`.
        model: Computes the nats.
        tokens_per_batch: Largest number of input tokens in a forward pass.
        device: Device of the model.
        prefix_id: The prefix token of `rows`.
        num_words: Words of the original text.
        num_bytes: UTF-8 bytes of the original text.
        is_included: Mask of the tokens that the caller's results include; by default all.
        name: The text and the model, for messages.
        store: Provides earlier finished batches, and receives new ones.
        rope_length_limit: Longest input whose rotary frequencies do not depend on its length (rope.length_limit).
        progress: Called with the number of input tokens, without padding, that all ranks have finished so far.

    Raises:
        DataError: The text has no token to score.
        NumericsError: Nats of an included token are not finite; raised on all ranks.
    """
    if not rows:
        num_documents = len(documents.document_offsets) - 1
        raise DataError(
            f"{name} has no token to score in {counted(num_documents, 'document')}; give a text of two or more words."
        )
    batches = batches_of(rows, tokens_per_batch, device.type, rope_length_limit)
    values = np.zeros((2, int(documents.document_offsets[-1])))
    pending = _restore_finished(values, batches, store)
    done = sum(row.num_inputs for row in rows) - _num_inputs(batches, pending)
    progress(done)

    def launch(numbers: list[int]) -> tuple[list[int], int | None, HostCopy]:
        own = next(iter(numbers[parallel.data_parallel_rank() :]), None)
        batch = Batch([], 1) if own is None else batches[own]
        return numbers, own, _launch(documents, batch, model, device, prefix_id)

    launched = map(launch, _rounds(pending, parallel.data_parallel_size()))
    for numbers, own, copy in _behind(launched, IN_FLIGHT[device.type]):
        batch_values = copy.wait()
        # Other ranks of the tensor-parallel group have the same values.
        if own is not None and parallel.tensor_parallel_rank() == 0:
            _scatter(values, batches[own], batch_values)
            if store is not None and np.isfinite(batch_values).all():
                store.keep(own, batch_values)
        done += _num_inputs(batches, numbers)
        progress(done)
    # Each position is set on one rank and 0.0 on the others, so this sum is exact.
    nats, greedy = parallel.sum_over_ranks(torch.from_numpy(values).to(device)).cpu().numpy()
    num_scored_tokens = sum(row.num_targets for row in rows)
    require_finite_nats(
        nats, documents.document_offsets, name=name, num_scored_tokens=num_scored_tokens, is_included=is_included
    )
    return Score(math.fsum(nats), num_scored_tokens, num_words, num_bytes, nats, greedy > 0)


def _rounds(numbers: list[int], size: int) -> Iterator[list[int]]:
    """Yield the batch numbers of each round, one batch per data-parallel rank."""
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def _behind(items: Iterable[T], num_in_flight: int) -> Iterator[T]:
    """Yield the items in order, each after `num_in_flight` later ones have been taken."""
    in_flight = deque[T]()
    for item in items:
        in_flight.append(item)
        if len(in_flight) > num_in_flight:
            yield in_flight.popleft()
    yield from in_flight


def _num_inputs(batches: list[Batch], numbers: Iterable[int]) -> int:
    return sum(row.num_inputs for number in numbers for row in batches[number].rows)


def _restore_finished(values: np.ndarray, batches: list[Batch], store: BatchStore | None) -> list[int]:
    """Scatter the main rank's finished batches into `values`; return the unfinished numbers, on every rank."""
    is_finished = torch.zeros(len(batches), dtype=torch.int64)
    if store is not None and parallel.is_main():
        for number, batch_values in store.finished.items():
            if not np.isfinite(batch_values).all():  # stored by an older version: computed again
                continue
            _scatter(values, batches[number], batch_values)
            is_finished[number] = 1
    is_finished = parallel.broadcast_from_main(is_finished)
    return [number for number, finished in enumerate(is_finished.tolist()) if not finished]


def _scatter(values: np.ndarray, batch: Batch, batch_values: np.ndarray) -> None:
    begin = 0
    for row in batch.rows:
        values[: len(batch_values), row.target_positions] = batch_values[:, begin : begin + row.num_targets]
        begin += row.num_targets


@torch.no_grad()
def _launch(
    documents: Documents, batch: Batch, model: TokenScorer, device: torch.device, prefix_id: int | None
) -> HostCopy:
    """Run the model on a batch, without waiting for the device; return the quantities of its targets, row by row."""
    return HostCopy(model(ScoringBatch.of(*_arrays(documents, batch, prefix_id), device)))


def _arrays(
    documents: Documents, batch: Batch, prefix_id: int | None
) -> tuple[Int64[np.ndarray, "batch time"], Int64[np.ndarray, "batch time"]]:
    inputs = np.zeros((max(1, len(batch.rows)), batch.num_columns), np.int64)
    labels = np.full_like(inputs, IGNORE_INDEX)
    for i, (first, window) in enumerate(batch.rows):
        if prefix_id is not None and window.begin == 0:
            tokens = np.concatenate([[prefix_id], documents.read(first + 1, first + window.end)])
        else:
            tokens = documents.read(first + window.begin, first + window.end)
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        labels[i, window.columns] = tokens[window.scored_from - window.begin :]
    return inputs, labels
