"""Verification of an export before it is published: plain transformers must load the trained model from it.

The reference is the checkpoint loaded into the training module, with adapters unmerged. It shares only the reading of
checkpoints with the code that writes exports.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaft.base.errors import REPORT, NumericsError
from megaft.models.nats_difference import NatsDifference, nats_difference
from megaft.models.offload import Fetch, from_disk, offloaded_model
from megaft.weights.canonical import TransformersView
from megaft.weights.checkpoint_reader import WEIGHT
from megaft.weights.loading.padding_tokens import attend_to_padding_tokens

MIN_MEAN = 0.1
"""Floor of the mean in the relative tolerance: fp32 logits are not exact to 1e-5 of a smaller mean."""

ROWS_FROM_DISK = 8
"""Limit of rows for models larger than host memory: each row reads all weights of both models."""

Rows = Sequence[Sequence[int]]
"""Rows of tokens; the last token of a row is predicted but not read."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Nats per token of the trained module and of the export, for the model card."""

    num_tokens: int
    trained: float
    exported: float

    def __str__(self) -> str:
        return (
            "Before it was published, plain transformers loaded it and scored "
            f"{self.num_tokens} held-out tokens at {self.exported:.6f} nats per token; the trained model had "
            f"{self.trained:.6f}."
        )


def check_nats(trained: Callable[[], nn.Module], folder: Path, rows: Rows) -> Verified:
    """Compare the nats of the trained module with those of the loaded export, holding one of them in memory at a time.

    Args:
        trained: Returns the trained module, its weights rounded to the export's dtype.
        folder: The export.
        rows: Held-out tokens.

    Raises:
        NumericsError: The nats differ by more than rounding, or are not finite.
    """
    expected = _nats(trained(), rows)
    gc.collect()
    from transformers import AutoModelForCausalLM

    loaded = attend_to_padding_tokens(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    exported = _nats(_ReferenceNats(loaded), rows)
    return _compared(expected, exported, folder)


def check_nats_from_disk(architecture: Any, fetch: Fetch, folder: Path, rows: Rows) -> Verified:
    """Compare like `check_nats` for a model larger than host memory, rereading its weights for each row.

    Args:
        architecture: transformers' configuration of the model.
        fetch: Returns a weight of the checkpoint by its name, rounded to the export's dtype, in fp32.
        folder: The export.
        rows: Held-out tokens, of which at most ROWS_FROM_DISK rows are compared.

    Raises:
        NumericsError: As in `check_nats`.
    """
    expected = _nats(_ReferenceNats(offloaded_model(architecture, fetch)), rows[:ROWS_FROM_DISK])
    with from_disk(folder) as model:
        exported = _nats(_ReferenceNats(attend_to_padding_tokens(model)), rows[:ROWS_FROM_DISK])
    return _compared(expected, exported, folder)


def _compared(trained: Tensor, exported: Tensor, folder: Path) -> Verified:
    difference = require_same_nats(trained, exported, folder)
    return Verified(difference.num_tokens, difference.mean, difference.other_mean)


def require_same_nats(trained: Tensor, exported: Tensor, folder: Path) -> NatsDifference:
    """Return the difference between two models' nats of the same tokens.

    Raises:
        NumericsError: They differ by more than rounding, or are not finite.
    """
    if num_bad := int((~trained.isfinite()).sum()):
        raise NumericsError(
            f"{folder} was not published: the trained model's nats of {num_bad:,} of {len(trained):,} held-out tokens "
            "are not finite. Its weights are damaged, or it overflows; export an earlier checkpoint, and train with a "
            "lower --optim.learning-rate."
        )
    difference = nats_difference(trained, exported)
    if not difference.is_rounding(scale=max(1, difference.mean), min_mean=MIN_MEAN):
        raise NumericsError(
            f"{folder} was not published: the model that plain transformers loads from it has "
            f"{difference.other_mean:.6f} nats per token on {difference.num_tokens} held-out tokens, but the trained "
            f"model has {difference.mean:.6f}. The checkpoint is intact; {REPORT}."
        )
    return difference


class _ReferenceNats(nn.Module):
    """A transformers model with torch's cross-entropy, as the reference."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Tensor:
        logits = self.language_model(input_ids=input_ids, use_cache=False).logits
        return F.cross_entropy(logits[0].float(), labels[0], reduction="none")


@torch.no_grad()
def _nats(model: nn.Module, rows: Rows) -> Tensor:
    """Return the nats of every token of the rows except the first of each row."""
    model.eval()
    nats = []
    for row in map(torch.tensor, rows):
        nats.append(model(row[None, :-1], row[None, 1:], positions=torch.arange(len(row) - 1)).double())
    return torch.cat(nats)


def load_weights(model: nn.Module, saved: TransformersView) -> None:
    """Load a checkpoint's fp32 weights into a language model of the run's architecture."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.read(name, WEIGHT))
