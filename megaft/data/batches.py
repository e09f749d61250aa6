"""Micro-batches: this rank's samples of a step, stacked and padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from megaft.base.device import copied_to
from megaft.data.left_out import Ranges, full_position
from megaft.data.samples import IGNORE_INDEX, Sample
from megaft.data.sequence import Samples

PADDED_TO = 64
"""Single-document samples are padded to the longest of their micro-batch, rounded up to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch on one rank; rows are padded at the end with unscored labels."""

    input_ids: Int64[Tensor, "batch time"]
    labels: Int64[Tensor, "batch time"]
    document_ids: Int64[Tensor, "batch time"] | None
    """None if attention is not kept within documents, or every row is part of one document."""
    num_tokens: int
    """Input tokens without padding."""
    num_scored: int
    first_position: int

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the model's inputs on its device, copied asynchronously."""
        documents = None if self.document_ids is None else copied_to(device, self.document_ids)
        return copied_to(device, self.input_ids), copied_to(device, self.labels), documents


@dataclass(frozen=True, slots=True)
class BatchSplit:
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
        """Return the first sample position of each of this rank's micro-batches, in a step that begins at `position`.

        Micro-batch m of rank r is number m * num_ranks + r of the global batch, so for a given micro-batch size the
        micro-batches are the same on any number of ranks.
        """
        numbers = range(self.rank, self.gradient_accumulation_steps * self.num_ranks, self.num_ranks)
        return [position + number * self.micro_batch_size for number in numbers]


def micro_batches(
    samples: Samples,
    position: int,
    left_out: Ranges,
    split: BatchSplit,
    row_length: int | None,
) -> list[Batch]:
    """Return this rank's micro-batches of a step.

    Args:
        samples: The run's samples.
        position: Samples taken by earlier steps.
        left_out: Samples of the full sequence that the run skips.
        split: Split of the global batch over ranks and micro-batches.
        row_length: From `Samples.row_length`.
    """
    with_document_ids, longest = samples.attend_within_documents, samples.context_length
    batches = []
    for first in split.first_positions(position):
        positions = [full_position(first + row, left_out) for row in range(split.micro_batch_size)]
        batches.append(
            collate([samples[index] for index in positions], positions[0], row_length, with_document_ids, longest)
        )
    return batches


def collate(
    rows: list[Sample], first_position: int, row_length: int | None, with_document_ids: bool, longest: int | None = None
) -> Batch:
    """Stack samples into a batch.

    Args:
        rows: Samples of the batch.
        first_position: Position of the first sample in the run's sequence.
        row_length: None pads to the longest sample, rounded up to a multiple of PADDED_TO.
        with_document_ids: Include the document ids, which keep attention within documents.
        longest: Upper limit of the rounded row length, since the model may have no positions beyond it.
    """
    rounded = -(-max(len(row.input_ids) for row in rows) // PADDED_TO) * PADDED_TO
    length = row_length or min(rounded, longest or rounded)

    def stack(arrays: list[np.ndarray], filler: int) -> np.ndarray:
        padded = np.full((len(arrays), length), filler, dtype=np.int64)
        for row, array in zip(padded, arrays, strict=True):
            row[: len(array)] = array
        return padded

    is_divided = with_document_ids and any(len(row.input_ids) < length or np.ptp(row.document_ids) for row in rows)
    # Counted in numpy: torch operations in the prefetching thread would start a second pool of threads.
    labels = stack([row.labels for row in rows], IGNORE_INDEX)
    return Batch(
        torch.from_numpy(stack([row.input_ids for row in rows], 0)),
        torch.from_numpy(labels),
        torch.from_numpy(stack([row.document_ids for row in rows], -1)) if is_divided else None,
        sum(len(row.input_ids) for row in rows),
        int((labels != IGNORE_INDEX).sum()),
        first_position,
    )
