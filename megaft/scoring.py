"""Sliding windows, and the nats of every token of a text: the one evaluator, used in training too.

Windows never cross documents. Batches are formed over the whole text and dealt to the data ranks in turn; the nats of
each token go to its own place in one array, and the sum runs over that array: the same score on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from megaft import parallel
from megaft.config import require
from megaft.errors import DataError
from megaft.loss import IGNORE_INDEX


class Window(NamedTuple):
    """A row of a forward pass, as positions in a token list: inputs [begin, end - 1), targets [scored_from, end)."""

    begin: int
    scored_from: int
    end: int

    @property
    def columns(self) -> slice:
        """Where in the row the targets are predicted: column t predicts token begin + t + 1."""
        return slice(self.scored_from - self.begin - 1, self.end - self.begin - 1)


def windows(num_tokens: int, context_length: int, stride: int) -> Iterator[Window]:
    """Yield windows that score every token but the first exactly once.

    The first window scores all its targets; each later one scores `stride` new tokens, the last perhaps fewer, behind a
    full left context. The windows of lm-evaluation-harness's `get_rolling_token_windows`, whose `context_len` is
    context_length - stride + 1.

    Raises:
        ConfigError: A stride above the context length would leave tokens unscored.
    """
    require(1 <= stride <= context_length, f"stride is {stride}; use 1 to {context_length} (the context length).")
    if num_tokens > 1:
        yield Window(0, 1, min(num_tokens, context_length + 1))
    for scored_from in range(context_length + 1, num_tokens, stride):
        end = min(scored_from + stride, num_tokens)
        yield Window(end - 1 - context_length, scored_from, end)


@dataclass(frozen=True, slots=True)
class Score:
    """What a text costs a model, in units that can be compared. An infinite perplexity is inf, never an error."""

    nats: float
    num_scored_tokens: int
    num_words: int | None = None
    """Words of the original text, before any detokenizing."""
    num_bytes: int | None = None
    """UTF-8 bytes of the original text."""
    token_nats: Float64[np.ndarray, " tokens"] | None = field(default=None, repr=False, compare=False)
    """Nats of each token of the text, in its order; 0.0 where a token is not scored."""

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
        return _exp(self.nats_per_token)

    @property
    def word_perplexity(self) -> float | None:
        """exp(nats / words), where the words are known."""
        return _exp(self.nats / self.num_words) if self.num_words else None

    @property
    def bits_per_byte(self) -> float | None:
        """Nats / (ln 2 * bytes), where the bytes are known."""
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else None

    def as_dict(self) -> dict[str, float]:
        """The row for metrics: every quantity that is known."""
        names = ("nats", "num_scored_tokens", "nats_per_token", "perplexity", "word_perplexity", "bits_per_byte")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _exp(nats: float) -> float:
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


def score(
    documents: Documents,
    token_nats: Callable[[Tensor, Tensor], Tensor],
    *,
    context_length: int,
    stride: int,
    batch_size: int,
    device: torch.device,
    prefix_id: int | None = None,
    eod_id: int | None = None,
    num_words: int | None = None,
    num_bytes: int | None = None,
) -> Score:
    """Score a text on all data ranks together; each returns the same bits, whatever their number.

    Every rank makes the same number of forward passes, all of one shape: under ZeRO-3 an uneven deal hangs, and a
    matmul of another shape may round otherwise. A rank without a batch passes one with nothing to score.

    Args:
        documents: The text; its tokens are read as they are needed.
        token_nats: The model, in evaluation mode: (input_ids, labels), both Int64 "batch time", to the nats of each
            label in Float32 "batch time". Labels are shifted already; IGNORE_INDEX costs 0.0.
        context_length: Input tokens per row of a forward pass.
        stride: Tokens scored per window after a document's first.
        batch_size: Windows per forward pass and rank.
        device: Where the model computes.
        prefix_id: Stands before each document, so that its first token is scored too. None leaves that one unscored.
        eod_id: Left out where it is a document's last token: the preparation put it there, not the author.
        num_words: Words of the original text.
        num_bytes: UTF-8 bytes of the original text.

    Raises:
        DataError: The text has no token to score.
    """
    num_scored_tokens = 0
    nats = np.zeros(int(documents.document_offsets[-1]))
    rows = _rows(documents, context_length, stride, prefix_id, eod_id)
    while deal := list(islice(rows, batch_size * parallel.data_parallel_size())):
        num_scored_tokens += sum(row.window.end - row.window.scored_from for row in deal)
        ours = deal[parallel.data_parallel_rank() * batch_size :][:batch_size]
        inputs, labels = _batch(documents, ours, prefix_id, batch_size, context_length)
        with torch.no_grad():
            batch_nats = token_nats(inputs.to(device), labels.to(device)).cpu()
        for row, row_nats in zip(ours, batch_nats.numpy(), strict=False):
            nats[row.places] = row_nats[row.window.columns]
    if num_scored_tokens == 0:
        num_documents = len(documents.document_offsets) - 1
        raise DataError(f"{num_documents} documents have no token to score; give a text of two words or more.")
    # Each place is filled on one rank and 0.0 on the others, so this sum rounds nothing.
    nats = parallel.sum_over_data_ranks(torch.from_numpy(nats).to(device)).cpu().numpy()
    return Score(math.fsum(nats), num_scored_tokens, num_words, num_bytes, nats)


class _Row(NamedTuple):
    """A window of a document whose position p is token first + p of the text; a prefix counts as position 0."""

    first: int
    window: Window

    @property
    def places(self) -> slice:
        return slice(self.first + self.window.scored_from, self.first + self.window.end)


def _rows(
    documents: Documents, context_length: int, stride: int, prefix_id: int | None, eod_id: int | None
) -> Iterator[_Row]:
    for begin, end in pairwise(map(int, documents.document_offsets)):
        if end > begin and eod_id is not None and documents.read(end - 1, end)[0] == eod_id:
            end -= 1
        first = begin if prefix_id is None else begin - 1
        for window in windows(end - first, context_length, stride):
            yield _Row(first, window)


def _batch(
    documents: Documents, rows: list[_Row], prefix_id: int | None, batch_size: int, context_length: int
) -> tuple[Int64[Tensor, "batch time"], Int64[Tensor, "batch time"]]:
    inputs = np.zeros((batch_size, context_length), np.int64)
    labels = np.full_like(inputs, IGNORE_INDEX)
    for i, (first, window) in enumerate(rows):
        if prefix_id is not None and window.begin == 0:
            tokens = np.concatenate([[prefix_id], documents.read(first + 1, first + window.end)])
        else:
            tokens = documents.read(first + window.begin, first + window.end)
        inputs[i, : len(tokens) - 1] = tokens[:-1]
        labels[i, window.columns] = tokens[window.scored_from - window.begin :]
    return torch.from_numpy(inputs), torch.from_numpy(labels)
