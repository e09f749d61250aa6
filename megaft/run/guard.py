"""Detect bad steps: non-finite values, spikes of loss or gradient norm, and repeated overflows.

A decision is a function of the steps before it alone, and what it compares with is in the checkpoint, so every rank,
and a resumed run, decides the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from megaft.config.policies import POLICIES, STOP
from megaft.config.train import FEWEST_VALUES, GuardConfig

MAD_TO_DEVIATION = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation (Rousseeuw & Croux 1993, eq. 1.3)."""

SMALLEST_DEVIATION = 0.01
"""Least deviation as a share of the median, so that a small change of a steady value is no spike."""


def fewest_values(window: int) -> int:
    """Return the fewest steps in the window with which a step can be called a spike.

    A quarter of it, and 32 at least. A deviation estimated from few values is often far too small: a normally
    distributed value lies 8 robust deviations above the median of 2 others once in 22 cases, of 8 once in 550, of 16
    once in 12,000, of 32 once in 560,000. OLMo-core's SkipStepOptimizer waits for half of its window of 128.
    """
    return max(FEWEST_VALUES, window // 4)


@dataclass(frozen=True, slots=True)
class Trouble:
    """A bad step and the decision about it."""

    event: str
    step: int
    decision: str
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        return f"{self.event} at step {self.step} (loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g})"


class Guard:
    """Judges every step by its loss and gradient norm, once, in order."""

    def __init__(self, config: GuardConfig, state: dict[str, Any], *, smallest_loss_scale: float | None) -> None:
        """Go on from the `state` of a checkpoint; an empty one is a new run's.

        Args:
            smallest_loss_scale: What fp16's may fall to, when gradients overflow; None in other precisions.
        """
        self._config = config
        self._smallest_loss_scale = smallest_loss_scale
        self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the `state` of a checkpoint."""
        size = self._config.spike_window
        self._losses = deque(map(float, state.get("losses", ())), size)
        self._grad_norms = deque(map(float, state.get("grad_norms", ())), size)
        self._overflows: int = state.get("overflows", 0)
        self._skipped_steps: int = state.get("skipped_steps", 0)
        self.skips: int = state.get("skips", 0)
        self.rewinds: int = state.get("rewinds", 0)
        self._judged: set[int] = set()
        self._troubles: list[Trouble] = []

    def state(self) -> dict[str, Any]:
        """Return the state that later decisions depend on, as JSON values."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "overflows": self._overflows,
            "skipped_steps": self._skipped_steps,
            "skips": self.skips,
            "rewinds": self.rewinds,
        }

    @property
    def decides_before_the_step(self) -> bool:
        """True if a step may be skipped, so that its loss and norm are needed before the weights move."""
        return any(POLICIES[name].skips for name in (self._config.non_finite, self._config.spike))

    def judge(self, rows: Iterable[dict[str, Any]]) -> list[Trouble]:
        """Take in steps; return what was wrong since the last call, up to the first that ends or rewinds the run.

        Args:
            rows: step, loss, grad_norm, the run's skipped_steps after it, and with fp16 loss_scale, of each step.
        """
        for row in rows:
            if row["step"] in self._judged:  # before its weights moved
                self._judged.remove(row["step"])
                self._skipped_steps = row["skipped_steps"]
            elif all(POLICIES[trouble.decision].then == "go on" for trouble in self._troubles):
                self._judge(row)
        troubles, self._troubles = self._troubles, []
        return troubles

    def wants(self, step: int, loss: float, grad_norm: float) -> bool:
        """Take in a step whose weights have not moved yet, which did not overflow; return whether they may."""
        self._judged.add(step)
        before = len(self._troubles)
        self._judge({"step": step, "loss": loss, "grad_norm": grad_norm, "skipped_steps": self._skipped_steps})
        return all(POLICIES[trouble.decision].moves_weights for trouble in self._troubles[before:])

    def _judge(self, row: dict[str, Any]) -> None:
        loss, grad_norm = row["loss"], math.nan if row["grad_norm"] is None else row["grad_norm"]
        overflowed = row["skipped_steps"] > self._skipped_steps
        self._skipped_steps = row["skipped_steps"]
        self._overflows = self._overflows + 1 if overflowed else 0
        is_scale_at_floor = row.get("loss_scale") == self._smallest_loss_scale
        event, decision = self._name(loss, grad_norm, overflowed, is_scale_at_floor)
        if event is not None:
            self.skips += POLICIES[decision].skips
            decision = STOP if self.skips > self._config.max_skips else decision
            self._troubles.append(Trouble(event, row["step"], decision, loss, grad_norm))
        elif not overflowed:
            self.skips = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)

    def _name(self, loss: float, grad_norm: float, overflowed: bool, is_scale_at_floor: bool) -> tuple[str | None, str]:
        if not math.isfinite(loss):
            return "non-finite loss", self._config.non_finite
        if overflowed and self._smallest_loss_scale is not None:
            if is_scale_at_floor:
                return "overflow at the smallest loss scale", STOP
            return ("overflow streak", STOP) if self._overflows >= self._config.max_overflows else (None, "")
        if overflowed or not math.isfinite(grad_norm):
            return "non-finite gradient", self._config.non_finite
        if POLICIES[self._config.spike].is_watched:
            for name, value, window in (
                ("loss", loss, self._losses),
                ("gradient norm", grad_norm, self._grad_norms),
            ):
                if self._is_spike(value, window):
                    return f"{name} spike", self._config.spike
        return None, ""

    def _is_spike(self, value: float, window: deque[float]) -> bool:
        if len(window) < fewest_values(self._config.spike_window):
            return False
        return value > median(window) + self._config.spike_deviations * robust_deviation(window)


def robust_deviation(values: Iterable[float]) -> float:
    """Return a standard deviation that outliers do not move: 1.4826 times the median distance from the median."""
    values = list(values)
    middle = median(values)
    spread = MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    return max(spread, SMALLEST_DEVIATION * abs(middle))
