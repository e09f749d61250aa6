"""Score a text by sliding windows: nats of every token. Training validates with it too.

Windows never cross documents. Batches are formed over the whole text and dealt to the data ranks in turn; the nats of
each token go to its own place in one array, and the sum runs over that array: the same score on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from megaft.base import parallel
from megaft.base.errors import DataError
from megaft.base.plural import counted
from megaft.data.samples import IGNORE_INDEX
from megaft.models.finite import require_finite_nats
from megaft.scoring.windows import Window

TokenScorer = Callable[[Tensor, Tensor], Tensor]
"""The model, in evaluation mode: (input_ids, labels), both Int64 "batch time", to Float32 "quantity batch time".

Labels are shifted already, and cost 0.0 where they are IGNORE_INDEX. The first quantity is the nats of each label; the
second, where there is one, is 1.0 where the label was the model's first choice.
"""


@dataclass(frozen=True, slots=True)
class Score:
    """Negative log-likelihood of a text, and the figures made of it.

    Nats are finite. A perplexity is inf where finite nats are too many for a float, as in a text of 10,000 tokens
    without white space, which is a single word.
    """

    nats: float
    num_scored_tokens: int
    num_words: int | None = None
    """Words of the original text, before any detokenizing."""
    num_bytes: int | None = None
    """UTF-8 bytes of the original text."""
    token_nats: Float64[np.ndarray, " tokens"] | None = field(default=None, repr=False, compare=False)
    """Nats of each token of the text, in its order; 0.0 where a token is not scored."""
    is_first_choice: Bool[np.ndarray, " tokens"] | None = field(default=None, repr=False, compare=False)
    """True at scored tokens that had the largest logit."""

    def of(self, is_scored: Bool[np.ndarray, " tokens"]) -> Score:
        """Return the score of some of the text's tokens, of which no words or bytes are known."""
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
        """exp(nats / words), where the words are known."""
        return exp(self.nats / self.num_words) if self.num_words else None

    @property
    def byte_perplexity(self) -> float | None:
        """exp(nats / bytes), where the bytes are known."""
        return exp(self.nats / self.num_bytes) if self.num_bytes else None

    @property
    def bits_per_byte(self) -> float | None:
        """Nats / (ln 2 * bytes), where the bytes are known."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else None

    def as_dict(self) -> dict[str, float]:
        """Return the row for metrics: every quantity that is known."""
        names = ("nats", "num_scored_tokens", "nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def exp(nats: float) -> float:
    """Return e to the `nats`, inf where that is too large for a float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@runtime_checkable
class Documents(Protocol):
    """A text in tokens: document d is read(document_offsets[d], document_offsets[d + 1])."""

    document_offsets: np.ndarray

    def read(self, begin: int, end: int) -> np.ndarray:
        """Tokens begin to end - 1 of the text."""
        ...


class Row(NamedTuple):
    """A window of a document whose position p is token first + p of the text; a prefix counts as position 0."""

    first: int
    window: Window

    @property
    def places(self) -> slice:
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
    cut: Callable[[int], Iterable[Window]],
    *,
    prefix_id: int | None = None,
    eod_id: int | None = None,
) -> list[Row]:
    """Cut every document into windows.

    Args:
        documents: The text.
        cut: From a number of tokens to windows, as `windows` is.
        prefix_id: Stands before each document, so that its first token is scored too. None leaves that one unscored.
        eod_id: Left out where it is a document's last token: the preparation put it there, not the author.
    """
    rows = []
    for begin, end in pairwise(map(int, documents.document_offsets)):
        if end > begin and eod_id is not None and documents.read(end - 1, end)[0] == eod_id:
            end -= 1
        first = begin if prefix_id is None else begin - 1
        rows += [Row(first, window) for window in cut(end - first)]
    return rows


def batches_of(rows: Sequence[Row], tokens_per_batch: int, longest_alike: int | None = None) -> list[list[Row]]:
    """Group rows of about one shape, the longest first, so that little of a batch is padding.

    A pure function of the rows: what is computed together does not depend on the ranks, and so neither do its bits.

    Args:
        rows: In any order.
        tokens_per_batch: Most input tokens of a batch, padding included; a longer row makes a batch of its own.
        longest_alike: No batch has both rows up to this length and longer ones (rope.length_limit).
    """

    def magnitude(row: Row) -> tuple[int, bool]:
        # The last layer and the head run on as many columns as the widest row has.
        return row.num_targets.bit_length(), longest_alike is not None and row.num_inputs > longest_alike

    def order(row: Row) -> tuple[int, bool, int]:
        columns, is_longer = magnitude(row)
        return -columns, not is_longer, -row.num_inputs

    batches = []
    for _, alike in groupby(sorted(rows, key=order), magnitude):
        group = list(alike)
        while group:
            num_rows = max(1, tokens_per_batch // group[0].num_inputs)
            batches.append(group[:num_rows])
            group = group[num_rows:]
    return batches


@runtime_checkable
class Keeper(Protocol):
    """Store of finished batches' nats, with which an interrupted evaluation continues."""

    finished: dict[int, np.ndarray]
    """By a batch's number, Float32 "quantity targets": what an earlier evaluation kept; the main rank's counts."""

    def keep(self, number: int, values: np.ndarray) -> None:
        """Keep a batch, in the order of its rows and their targets."""
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
    is_counted: Bool[np.ndarray, " tokens"] | None = None,
    name: str = "the text",
    keeper: Keeper | None = None,
    longest_alike: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Score:
    """Score a text on all data ranks together; each returns the same bits, whatever their number.

    Every rank makes the same number of forward passes: under ZeRO-3 an uneven deal hangs. A rank without a batch
    passes one token with nothing to score.

    Args:
        documents: The text; its tokens are read as they are needed.
        rows: Its windows, from `rows_of`.
        model: What computes nats.
        tokens_per_batch: Most input tokens of a forward pass.
        device: Where the model computes.
        prefix_id: The prefix that `rows` have.
        num_words: Words of the original text.
        num_bytes: UTF-8 bytes of the original text.
        is_counted: The tokens that the caller makes figures of; by default all of them.
        name: The text and the model, for messages.
        keeper: Has finished batches, and is given those finished here.
        longest_alike: The longest input of the model whose states do not depend on how long it is.
        progress: Called with the input tokens, without padding, that all ranks together have finished so far.

    Raises:
        DataError: The text has no token to score.
        NumericsError: Nats of a token that counts are not finite; on all ranks together.
    """
    if not rows:
        num_documents = len(documents.document_offsets) - 1
        raise DataError(
            f"{counted(num_documents, 'document')} without a token to score; give a text of two words or more."
        )
    batches = batches_of(rows, tokens_per_batch, longest_alike)
    values = np.zeros((2, int(documents.document_offsets[-1])))
    waiting = _fill_with_finished(values, batches, keeper)
    done = sum(row.num_inputs for row in rows) - _num_inputs(batches, waiting)
    progress(done)
    for deal in _deals(waiting, parallel.data_parallel_size()):
        ours = deal[parallel.data_parallel_rank() :][:1]
        batch = batches[ours[0]] if ours else []
        found = _values_of(documents, batch, model, device, prefix_id)
        if ours and parallel.tensor_parallel_rank() == 0:  # the others that share its matrices have found the same
            _put(values, batch, found)
            if keeper is not None and np.isfinite(found).all():
                keeper.keep(ours[0], found)
        done += _num_inputs(batches, deal)
        progress(done)
    # Each place is filled on one rank and 0.0 on the others, so this sum rounds nothing.
    nats, choices = parallel.sum_over_ranks(torch.from_numpy(values).to(device)).cpu().numpy()
    num_scored_tokens = sum(row.num_targets for row in rows)
    require_finite_nats(
        nats, documents.document_offsets, name=name, num_scored_tokens=num_scored_tokens, is_counted=is_counted
    )
    return Score(math.fsum(nats), num_scored_tokens, num_words, num_bytes, nats, choices > 0)


def _deals(numbers: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def _num_inputs(batches: list[list[Row]], numbers: Iterable[int]) -> int:
    return sum(row.num_inputs for number in numbers for row in batches[number])


def _fill_with_finished(values: np.ndarray, batches: list[list[Row]], keeper: Keeper | None) -> list[int]:
    """Put the main rank's finished batches in their places, and return the numbers of the others on every rank."""
    is_finished = torch.zeros(len(batches), dtype=torch.int64)
    if keeper is not None and parallel.is_main():
        for number, found in keeper.finished.items():
            if not np.isfinite(found).all():  # of a version that kept these too: computed again
                continue
            _put(values, batches[number], found)
            is_finished[number] = 1
    is_finished = parallel.from_main(is_finished)
    return [number for number in range(len(batches)) if not is_finished[number]]


def _put(values: np.ndarray, batch: list[Row], found: np.ndarray) -> None:
    begin = 0
    for row in batch:
        values[: len(found), row.places] = found[:, begin : begin + row.num_targets]
        begin += row.num_targets


@torch.no_grad()
def _values_of(
    documents: Documents, batch: list[Row], model: TokenScorer, device: torch.device, prefix_id: int | None
) -> Float32[np.ndarray, "quantity targets"]:
    """Run the model on a batch and return what its targets cost, row by row."""
    inputs, labels = (tensor.to(device) for tensor in _tensors(documents, batch, prefix_id))
    return model(inputs, labels)[:, labels != IGNORE_INDEX].cpu().numpy()


def _tensors(
    documents: Documents, batch: list[Row], prefix_id: int | None
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
    inputs = np.zeros((max(1, len(batch)), max((row.num_inputs for row in batch), default=1)), np.int64)
    labels = np.full_like(inputs, IGNORE_INDEX)
    for i, (first, window) in enumerate(batch):
        if prefix_id is not None and window.begin == 0:
            tokens = np.concatenate([[prefix_id], documents.read(first + 1, first + window.end)])
        else:
            tokens = documents.read(first + window.begin, first + window.end)
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        labels[i, window.columns] = tokens[window.scored_from - window.begin :]
    return torch.from_numpy(inputs), torch.from_numpy(labels)
