"""Scoring batch: rows of tokens on the device, and the positions to score, known on the host.

A mask on the device would make the host wait to learn how many positions it selects. So indices are computed on the
host with NumPy and copied to the device from pinned memory, and nothing in a batch waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from megaft.base.device import copied_to
from megaft.data.samples import IGNORE_INDEX
from megaft.models.loss import at_positions


@dataclass(frozen=True, slots=True)
class ScoringBatch:
    """Rows of tokens, padded on the right, with labels; a position is scored unless its label is IGNORE_INDEX."""

    input_ids: Int64[Tensor, "batch time"]
    labels: Int64[Tensor, "batch time"]
    """The next token of each."""
    is_scored: Bool[np.ndarray, "batch time"]
    positions: Int64[Tensor, " scored"]
    """Scored positions of the flattened batch, row by row."""

    @classmethod
    def of(
        cls, input_ids: Int64[np.ndarray, "batch time"], labels: Int64[np.ndarray, "batch time"], device: torch.device
    ) -> ScoringBatch:
        """Copy a batch to the device."""
        is_scored = labels != IGNORE_INDEX
        arrays = input_ids, labels, np.flatnonzero(is_scored)
        on_device, labels_on_device, positions = (to_device(array, device) for array in arrays)
        return cls(on_device, labels_on_device, is_scored, positions)

    @property
    def targets(self) -> Int64[Tensor, " scored"]:
        """Labels of the scored positions."""
        return at_positions(self.labels, self.positions)

    @property
    def is_first(self) -> Bool[np.ndarray, " scored"]:
        """True at the first scored position of each row."""
        return self.is_scored.cumsum(1)[self.is_scored] == 1

    def select(self, states: Float[Tensor, "batch time width"]) -> Float[Tensor, "scored width"]:
        """Return the states of the scored positions."""
        return at_positions(states, self.positions)


def to_device(array: Int64[np.ndarray, ...], device: torch.device) -> Int64[Tensor, ...]:
    """Return an array as a tensor on the device, copied asynchronously."""
    return copied_to(device, torch.from_numpy(array))
