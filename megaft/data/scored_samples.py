"""Find the samples that have a scored token; the others have no loss to train on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64

from megaft.data.indexed import TokenFile

TOKENS_AT_ONCE = 1 << 24
"""Tokens of the loss mask in memory at a time."""

SampleNumbers = Int64[np.ndarray, " samples"]


def holds_scored_token(
    num_samples: int,
    context_length: int,
    label_range: Callable[[SampleNumbers], tuple[SampleNumbers, SampleNumbers]],
    mask: TokenFile | None,
    unscored: Int64[np.ndarray, " tokens"],
) -> Bool[np.ndarray, " {num_samples}"]:
    """Return a mask of the samples that have at least one scored label.

    It depends only on the dataset, so it is the same on every rank and every resume.

    Args:
        num_samples: Number of samples in the dataset.
        context_length: Maximum labels of a sample.
        label_range: Maps sample numbers to the ascending bounds [begin, end) of their labels.
        mask: Loss mask; None if all tokens are scored.
        unscored: Ascending positions of labels that never count as scored.
    """
    size = max(1, TOKENS_AT_ONCE // context_length)
    parts = (label_range(np.arange(first, min(first + size, num_samples))) for first in range(0, num_samples, size))
    return np.concatenate([np.zeros(0, bool), *(_holds(*part, mask, unscored) for part in parts)])


def _holds(begins: SampleNumbers, ends: SampleNumbers, mask: TokenFile | None, unscored: np.ndarray) -> np.ndarray:
    begin, end = int(begins[0]), int(ends[-1])
    inside = unscored[np.searchsorted(unscored, begin) : np.searchsorted(unscored, end)]
    if mask is None:
        num_unscored = np.searchsorted(inside, ends) - np.searchsorted(inside, begins)
        return num_unscored < ends - begins
    is_scored = np.array(mask.read(begin, end)) != 0
    is_scored[inside - begin] = False
    # Some tokens may lie between two samples; every second range is that of a sample.
    bounds = np.stack([begins, ends], axis=1).ravel()[:-1] - begin
    return np.logical_or.reduceat(is_scored, bounds)[::2]
