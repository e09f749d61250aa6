"""Training state besides weights and optimizer states: progress, and the settings a resumed run must not change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class RunState:
    """Progress of a run, saved with its weights and optimizer states."""

    step: int = 0
    """Optimizer steps tried."""
    skipped_steps: int = 0
    """Steps dropped for fp16 overflow."""
    tokens_seen: int = 0
    """Scored tokens trained on, over all ranks."""
    position: int = 0
    """Samples taken from the run's sequence, without those left out."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Samples the guard left out, as rising ranges [begin, end) of the whole sequence."""
    best_step: int | None = None
    best_nats_per_token: float | None = None
    validations_since_best: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guard: the recent steps that the next is compared with."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """Return the state whose `asdict` was written as JSON."""
        left_out = tuple((begin, end) for begin, end in values.pop("left_out"))
        return cls(**values, left_out=left_out)

    def after_validation(self, nats_per_token: float) -> RunState:
        """Return the state with this step's validation taken in."""
        best = math.inf if self.best_nats_per_token is None else self.best_nats_per_token
        if nats_per_token < best:  # never where it is not a number
            return replace(self, best_step=self.step, best_nats_per_token=nats_per_token, validations_since_best=0)
        return replace(self, validations_since_best=self.validations_since_best + 1)


@dataclass(frozen=True, slots=True)
class Identity:
    """Settings that must equal the checkpoint's for it to continue the same run."""

    global_batch_size: int
    seed: int
    data: str
    context_length: int
    sample: str
    attend_within_documents: bool
    tokenizer: str
    model: str
    dropout: float | None
    optim: dict[str, Any]
    schedule_steps: int | None
    """The run's steps, where the learning rate depends on them."""
    validation: str | None
    names: dict[str, str] = field(default_factory=dict)
    """Readable names of the fields that are hashes; for messages, never compared."""
