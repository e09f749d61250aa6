"""Table of learning-rate schedules: one entry per schedule, a function of the fraction of the decay that is done.

To add one, add an entry. Warmup and peak are the same for all; see `megaft.run.optim.learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megaft.config.deepspeed_keys import BlockTranslation

TOTAL_STEPS = "total_num_steps"
"""Not a field of OptimConfig: the run's length, which is --run.max-steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Learning-rate schedule after warmup."""

    remaining: Callable[[float], float]
    """Decay factor from 1 (peak) to 0 (final value), as a function of the fraction of the decay that is done."""
    decays: bool = True
    """False if the rate stays at the peak, so that run length and --optim.final-fraction have no effect."""
    block: BlockTranslation | None = None
    """Translation of DeepSpeed JSON blocks to this schedule; None if there is none."""

    @property
    def settings(self) -> frozenset[str]:
        """Fields of OptimConfig that this schedule uses, and that some others do not."""
        return frozenset({"final_fraction"} if self.decays else ())


_WARMUP: dict[str, Any] = {"warmup_num_steps": ("warmup_steps", 1000)}
_LINEAR: dict[str, Any] = {"warmup_type": ("linear", "log")}

SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(
        remaining=lambda progress: 1.0,
        decays=False,
        block=BlockTranslation(
            types=("WarmupLR",),
            takes={**_WARMUP, "warmup_max_lr": ("learning_rate", None)},
            only={**_LINEAR, "warmup_min_lr": (0, 0)},
        ),
    ),
    "linear": Schedule(
        remaining=lambda progress: 1.0 - progress,
        block=BlockTranslation(
            types=("WarmupDecayLR",),
            sets={"final_fraction": 0.0},
            takes={**_WARMUP, "warmup_max_lr": ("learning_rate", ...), TOTAL_STEPS: (TOTAL_STEPS, ...)},
            only={**_LINEAR, "warmup_min_lr": (0, 0)},
        ),
    ),
    "cosine": Schedule(  # half a cosine: Loshchilov and Hutter 2017, equation 5
        remaining=lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
        block=BlockTranslation(
            types=("WarmupCosineLR",),
            takes={**_WARMUP, "cos_min_ratio": ("final_fraction", 1e-4), TOTAL_STEPS: (TOTAL_STEPS, ...)},
            only={**_LINEAR, "warmup_min_ratio": (0, 0)},
        ),
    ),
}

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[*SCHEDULES]
