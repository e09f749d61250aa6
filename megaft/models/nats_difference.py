"""Difference between two models' nats of the same tokens, and its tolerance."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_NATS, MAX_RELATIVE = 1e-3, 1e-5
"""Tolerance of one token's nats, and relative tolerance of the mean. Two models with the same weights that compute in
fp32 differ only by the order of sums. A wrong weight, merge or layout differs a thousand times as much."""


class NatsDifference(NamedTuple):
    """Difference between two models' nats of the same tokens."""

    num_tokens: int
    mean: float
    """Nats per token of the first model."""
    other_mean: float
    """Nats per token of the second model."""
    largest: float
    """Largest difference of one token's nats."""

    @property
    def of_means(self) -> float:
        """Absolute difference of the means."""
        return abs(self.other_mean - self.mean)

    @property
    def relative(self) -> float:
        """Difference of the means, relative to the first."""
        return self.of_means / self.mean

    def is_rounding(self, *, scale: float = 1.0, min_mean: float = 0.0) -> bool:
        """Return True if both differences are within their tolerances; False if one is NaN.

        Args:
            scale: Factor of one token's tolerance.
            min_mean: Floor of the mean in the relative tolerance.
        """
        return self.largest <= MAX_NATS * scale and self.of_means <= MAX_RELATIVE * max(min_mean, self.mean)


def nats_difference(first: Tensor, second: Tensor) -> NatsDifference:
    """Return the difference between two models' nats, shape (tokens,)."""
    largest = float((first - second).abs().max())
    return NatsDifference(len(first), float(first.mean()), float(second.mean()), largest)
