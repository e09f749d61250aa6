"""Select the samples that hold a scored token; the others train nothing and have no mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int64

from megaft.data.indexed import TokenFile

TOKENS_AT_ONCE = 1 << 24
"""Tokens whose part of the mask is in memory at one time."""

Samples = Int64[np.ndarray, " samples"]


def holds_scored_token(
    num_samples: int,
    context_length: int,
    labels: Callable[[Samples], tuple[Samples, Samples]],
    mask: TokenFile | None,
    never: Int64[np.ndarray, " tokens"],
) -> Bool[np.ndarray, " {num_samples}"]:
    """Return for each sample whether one of its labels is scored.

    A function of the dataset alone: every rank, and every start of a run, finds the same.

    Args:
        num_samples: Samples of the dataset.
        context_length: Most labels of a sample.
        labels: From the numbers of samples to the positions of their first label and behind their last: both rising.
        mask: Which tokens are scored; None: all.
        never: Rising positions of labels that are not scored whatever the mask says.
    """
    size = max(1, TOKENS_AT_ONCE // context_length)
    parts = (labels(np.arange(first, min(first + size, num_samples))) for first in range(0, num_samples, size))
    return np.concatenate([np.zeros(0, bool), *(_holds(*part, mask, never) for part in parts)])


def _holds(begins: Samples, ends: Samples, mask: TokenFile | None, never: np.ndarray) -> np.ndarray:
    begin, end = int(begins[0]), int(ends[-1])
    here = never[np.searchsorted(never, begin) : np.searchsorted(never, end)]
    if mask is None:
        num_never = np.searchsorted(here, ends) - np.searchsorted(here, begins)
        return num_never < ends - begins
    is_scored = np.array(mask.read(begin, end)) != 0
    is_scored[here - begin] = False
    # Tokens of neither may stand between two samples: every second of these ranges is a sample's.
    bounds = np.stack([begins, ends], axis=1).ravel()[:-1] - begin
    return np.logical_or.reduceat(is_scored, bounds)[::2]
