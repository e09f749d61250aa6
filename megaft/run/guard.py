"""Detect bad steps: non-finite values, spikes of loss or gradient norm, and repeated overflows.

A decision depends only on earlier steps, whose statistics are in the checkpoint, so every rank and a resumed run
decide the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from megaft.config.policies import POLICIES, STOP
from megaft.config.train import MIN_SPIKE_STEPS, GuardConfig

MAD_TO_DEVIATION = 1.4826
"""Ratio of a normal distribution's standard deviation to its median absolute deviation (Rousseeuw & Croux 1993,
eq. 1.3)."""

MIN_DEVIATION = 0.01
"""Minimum deviation as a fraction of the median, so that a small change of a steady value is not a spike."""


def min_steps(window: int) -> int:
    """Return the number of steps the window must hold before spikes are detected.

    A quarter of the window, and at least 32 steps. A deviation estimated from few values is often far too small: the
    probability that a normally distributed value exceeds the median of n others by 8 of their robust deviations is 1 in
    22 for n = 2, 1 in 550 for 8, 1 in 12,000 for 16, and 1 in 560,000 for 32.

    OLMo-core's SkipStepOptimizer waits for half of its window of 128.
    """
    return max(MIN_SPIKE_STEPS, window // 4)


@dataclass(frozen=True, slots=True)
class BadStep:
    """Bad step and the decision about it."""

    event: str
    step: int
    decision: str
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        return f"{self.event} at step {self.step} (loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g})"


class Guard:
    """Detection of bad steps by loss and gradient norm, each step once and in order."""

    def __init__(self, config: GuardConfig, state: dict[str, Any], *, smallest_loss_scale: float | None) -> None:
        """Restore the `state` of a checkpoint; empty for a new run.

        Args:
            smallest_loss_scale: Minimum of fp16's dynamic loss scale; None in other precisions.
        """
        self._config = config
        self._smallest_loss_scale = smallest_loss_scale
        self.restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the `state` of a checkpoint."""
        size = self._config.spike_window
        self._losses = deque(map(float, state.get("losses", ())), size)
        self._grad_norms = deque(map(float, state.get("grad_norms", ())), size)
        self._overflows: int = state.get("overflows", 0)
        self._skipped_steps: int = state.get("skipped_steps", 0)
        self.skips: int = state.get("skips", 0)
        self.rewinds: int = state.get("rewinds", 0)
        self._judged: set[int] = set()
        self._bad_steps: list[BadStep] = []

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
    def needs_norm_before_update(self) -> bool:
        """True if a step may be skipped, so that its loss and gradient norm are needed before its update."""
        return any(POLICIES[name].skips for name in (self._config.non_finite, self._config.spike))

    def judge(self, rows: Iterable[dict[str, Any]]) -> list[BadStep]:
        """Judge steps; return the bad ones since the last call, up to the first that ends or rewinds the run.

        Args:
            rows: step, loss, grad_norm, the run's skipped_steps after it, and with fp16 loss_scale, of each step.
        """
        for row in rows:
            if row["step"] in self._judged:  # by `accepts`
                self._judged.remove(row["step"])
                self._skipped_steps = row["skipped_steps"]
            elif all(POLICIES[bad_step.decision].then == "go on" for bad_step in self._bad_steps):
                self._judge(row)
        bad_steps, self._bad_steps = self._bad_steps, []
        return bad_steps

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Judge a step before its update, which did not overflow; return True if it may update the weights."""
        self._judged.add(step)
        before = len(self._bad_steps)
        self._judge({"step": step, "loss": loss, "grad_norm": grad_norm, "skipped_steps": self._skipped_steps})
        return all(POLICIES[bad_step.decision].moves_weights for bad_step in self._bad_steps[before:])

    def _judge(self, row: dict[str, Any]) -> None:
        loss, grad_norm = row["loss"], math.nan if row["grad_norm"] is None else row["grad_norm"]
        overflowed = row["skipped_steps"] > self._skipped_steps
        self._skipped_steps = row["skipped_steps"]
        self._overflows = self._overflows + 1 if overflowed else 0
        is_scale_at_floor = row.get("loss_scale") == self._smallest_loss_scale
        event, decision = self._classify(loss, grad_norm, overflowed, is_scale_at_floor)
        if event is not None:
            if POLICIES[decision].skips and self.skips >= self._config.max_skips:
                decision = STOP
            self.skips += POLICIES[decision].skips
            self._bad_steps.append(BadStep(event, row["step"], decision, loss, grad_norm))
        elif not overflowed:
            self.skips = 0
            self._losses.append(loss)
            self._grad_norms.append(grad_norm)

    def _classify(
        self, loss: float, grad_norm: float, overflowed: bool, is_scale_at_floor: bool
    ) -> tuple[str | None, str]:
        """Return the event and the decision; the event is None if the step is good."""
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
        if len(window) < min_steps(self._config.spike_window):
            return False
        return value > median(window) + self._config.spike_deviations * robust_deviation(window)


def robust_deviation(values: Iterable[float]) -> float:
    """Return a robust standard deviation: 1.4826 times the median absolute deviation (MAD)."""
    values = list(values)
    middle = median(values)
    spread = MAD_TO_DEVIATION * median(abs(value - middle) for value in values)
    return max(spread, MIN_DEVIATION * abs(middle))
