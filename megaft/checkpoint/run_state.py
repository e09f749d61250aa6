"""Training progress, and the identity of a run: the settings that a resumed run must not change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class RunState:
    """Progress of a run, saved with its weights and optimizer states."""

    step: int = 0
    """Optimizer steps attempted."""
    skipped_steps: int = 0
    """Steps whose update DeepSpeed (non-finite gradient, such as an fp16 overflow) or the guard's `skip` discarded."""
    tokens_seen: int = 0
    """Scored tokens trained on, over all ranks; `tokens_per_second` counts input tokens."""
    position: int = 0
    """Samples taken from the run's sequence, not counting those left out."""
    left_out: tuple[tuple[int, int], ...] = ()
    """Samples that the guard left out, as ascending ranges [begin, end) of the full sequence."""
    best_step: int | None = None
    best_nats_per_token: float | None = None
    validations_since_best: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    """State of the guard: recent steps, with which the next is compared."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunState:
        """Return the state whose `asdict` was written as JSON.

        Raises:
            KeyError, TypeError, ValueError: megaft did not write it.
        """
        left_out = tuple((begin, end) for begin, end in values["left_out"])
        return replace(cls(**values), left_out=left_out)

    def after_validation(self, nats_per_token: float) -> RunState:
        """Return the state updated with this step's validation."""
        best = math.inf if self.best_nats_per_token is None else self.best_nats_per_token
        if nats_per_token < best:  # False for NaN
            return replace(self, best_step=self.step, best_nats_per_token=nats_per_token, validations_since_best=0)
        return replace(self, validations_since_best=self.validations_since_best + 1)


@dataclass(frozen=True, slots=True)
class Identity:
    """Settings that must equal the checkpoint's when a run resumes; `config.identity` has their names in messages.

    Fields of ADDED_LATER, and keys of fields that are dicts, are compared only if the checkpoint has them.
    """

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
    """Length of the run in steps if the learning rate depends on it, else None."""
    validation: str | None
    gradient_clipping: float | None = None
    precision: str | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    """Rank of the LoRA adapters (0 without LoRA) and, above 0, their other settings."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's configuration, without dropout probabilities that --model.dropout sets."""
    model_weights: str | None = None
    """Fingerprint of the pretrained weights that the run started from; None for a model from scratch."""
    names: dict[str, str] = field(default_factory=dict)
    """Readable names for fields that are hashes; used in messages, never compared."""


ADDED_LATER = frozenset({"gradient_clipping", "precision", "lora", "model_config", "model_weights"})
"""Fields that the first versions of megaft did not record."""
