"""Table of learning-rate schedules: one entry for each, a pure function of the share of the run that is done.

To add one, add an entry. The warm-up and the peak are the same for all; see `megaft.run.optim.learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from megaft.config.deepspeed_keys import Block

TOTAL_STEPS = "total_num_steps"
"""Not a field of OptimConfig: the run's length, which is --run.max-steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A learning-rate schedule after the warm-up."""

    remaining: Callable[[float], float]
    """Share of the way from the last step's rate up to the peak, given the share of the decay that is over: from 1.0 at
    0.0 to 0.0 at 1.0."""
    decays: bool = True
    """False if every rate is the peak, whatever the run's length and --optim.final-fraction."""
    block: Block | None = None
    """DeepSpeed JSON blocks that mean this schedule; None if there are none."""

    @property
    def settings(self) -> frozenset[str]:
        """Fields of OptimConfig that this schedule uses and others may not."""
        return frozenset({"final_fraction"} if self.decays else ())


_WARMUP: dict[str, Any] = {"warmup_num_steps": ("warmup_steps", 1000)}
_LINEAR: dict[str, Any] = {"warmup_type": ("linear", "log")}

SCHEDULES: dict[str, Schedule] = {
    "constant": Schedule(
        remaining=lambda progress: 1.0,
        decays=False,
        block=Block(
            types=("WarmupLR",),
            takes={**_WARMUP, "warmup_max_lr": ("learning_rate", None)},
            only={**_LINEAR, "warmup_min_lr": (0, 0)},
        ),
    ),
    "linear": Schedule(
        remaining=lambda progress: 1.0 - progress,
        block=Block(
            types=("WarmupDecayLR",),
            sets={"final_fraction": 0.0},
            takes={**_WARMUP, "warmup_max_lr": ("learning_rate", ...), TOTAL_STEPS: (TOTAL_STEPS, ...)},
            only={**_LINEAR, "warmup_min_lr": (0, 0)},
        ),
    ),
    "cosine": Schedule(  # half a cosine: Loshchilov and Hutter 2017, equation 5
        remaining=lambda progress: (1.0 + math.cos(math.pi * progress)) / 2.0,
        block=Block(
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
