"""Check of an export before it is published: transformers alone must load from it the model that was trained.

The reference is the checkpoint in the module that trains, its adapters not merged. It shares no code with what writes
an export but the reading of checkpoints.
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
from megaft.models.offload import Fetch, from_disk, offloaded_model
from megaft.weights.canonical import TransformersView
from megaft.weights.checkpoint_reader import WEIGHT
from megaft.weights.loading.padding_tokens import read_padding_tokens

MAX_NATS, MAX_RELATIVE = 1e-3, 1e-5
"""Tolerance of one token's nats, and relative tolerance of the mean. Both models have the same weights and compute in
fp32, so they differ by the order of sums alone. A wrong weight, merge or layout differs a thousand times as much."""

SMALLEST_MEAN = 0.1
"""Floor of the mean in the relative tolerance: fp32 logits are not exact to 1e-5 of less."""

ROWS_FROM_DISK = 8
"""Rows that models larger than the host's memory are compared on, at most: each reads all weights of both."""

Rows = Sequence[Sequence[int]]
"""Tokens, each row an input whose last token is only predicted."""


@dataclass(frozen=True, slots=True)
class Verified:
    """Nats per token of the trained module and of the export, for the model card."""

    num_tokens: int
    trained: float
    exported: float

    def __str__(self) -> str:
        return (
            "Before it was published, plain transformers loaded it and found the trained model's nats on "
            f"{self.num_tokens} held-out tokens: {self.exported:.6f} per token, the trained model {self.trained:.6f}."
        )


def check_nats(trained: Callable[[], nn.Module], folder: Path, rows: Rows) -> Verified:
    """Compare the nats of a trained module with those of the loaded export; only one of them is in memory at a time.

    Args:
        trained: Returns the trained module, its weights rounded to the export's dtype.
        folder: The export.
        rows: Held-out tokens.

    Raises:
        NumericsError: They differ by more than the order of sums explains, or are not finite.
    """
    expected = _nats(trained(), rows)
    gc.collect()
    from transformers import AutoModelForCausalLM

    loaded = read_padding_tokens(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    found = _nats(_PlainNats(loaded), rows)
    return _verified(expected, found, folder)


def check_nats_from_disk(architecture: Any, fetch: Fetch, folder: Path, rows: Rows) -> Verified:
    """Compare as `check_nats` for a model larger than host memory, reading its weights anew for each row.

    Args:
        architecture: transformers' configuration of the model.
        fetch: Returns a weight of the checkpoint by its name, rounded to the export's dtype, in fp32.
        folder: The export.
        rows: Held-out tokens, of which no more than ROWS_FROM_DISK rows are compared.

    Raises:
        NumericsError: As from `check_nats`.
    """
    expected = _nats(_PlainNats(offloaded_model(architecture, fetch)), rows[:ROWS_FROM_DISK])
    with from_disk(folder) as model:
        found = _nats(_PlainNats(read_padding_tokens(model)), rows[:ROWS_FROM_DISK])
    return _verified(expected, found, folder)


def _verified(trained: Tensor, exported: Tensor, folder: Path) -> Verified:
    require_same_nats(trained, exported, folder)
    return Verified(len(trained), float(trained.mean()), float(exported.mean()))


def require_same_nats(trained: Tensor, exported: Tensor, folder: Path) -> None:
    """Raise NumericsError where two models' nats of the same tokens are not equal but for rounding, or not finite."""
    if num_bad := int((~trained.isfinite()).sum()):
        raise NumericsError(
            f"{folder} was not published: the trained model's nats of {num_bad:,} of {len(trained):,} held-out tokens "
            "are not finite. Its weights are damaged, or overflow: export an earlier checkpoint, and lower "
            "--optim.learning-rate."
        )
    mean, other = float(trained.mean()), float(exported.mean())
    largest = float((trained - exported).abs().max())
    if not (largest <= MAX_NATS * max(1, mean) and abs(mean - other) <= MAX_RELATIVE * max(SMALLEST_MEAN, mean)):
        raise NumericsError(
            f"{folder} was not published: plain transformers loads another model from it, with {other:.6f} nats per "
            f"token on {len(trained)} held-out tokens, and the trained model has {mean:.6f}. The checkpoint is whole; "
            f"{REPORT}."
        )


class _PlainNats(nn.Module):
    """A transformers model with torch's cross-entropy."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Any) -> Tensor:
        logits = self.language_model(input_ids=input_ids, use_cache=False).logits
        return F.cross_entropy(logits[0].float(), labels[0], reduction="none")[None]


@torch.no_grad()
def _nats(model: nn.Module, rows: Rows) -> Tensor:
    """Return the nats of every token of the rows but their first."""
    model.eval()
    nats = []
    for row in map(torch.tensor, rows):
        nats.append(model(row[None, :-1], row[None, 1:], per_token=True)[0].double())
    return torch.cat(nats)


def load_weights(model: nn.Module, saved: TransformersView) -> None:
    """Put a checkpoint's fp32 weights into a language model of the run's architecture."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.read(name, WEIGHT))
