"""95 % confidence intervals of ratios and shares."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


def ratio_interval(numerators: ArrayLike, denominators: ArrayLike) -> tuple[float, float] | None:
    """Return the interval of sum(numerators) / sum(denominators) over independent units, such as nats per word.

    The variance of a ratio estimate by linearization: Cochran, Sampling Techniques (3rd ed., 1977), equation 6.13.
    None for fewer than two units.
    """
    x, y = np.asarray(numerators, float), np.asarray(denominators, float)
    if len(x) < 2 or y.sum() <= 0:
        return None
    ratio = x.sum() / y.sum()
    variance = len(x) / (len(x) - 1) * np.square(x - ratio * y).sum() / y.sum() ** 2
    return ratio - Z * math.sqrt(variance), ratio + Z * math.sqrt(variance)


def share_interval(num_right: int, num_tried: int) -> tuple[float, float]:
    """Return Wilson's score interval of a share (Wilson 1927), such as an accuracy."""
    share, spread = num_right / num_tried, Z**2 / num_tried
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return middle - half, middle + half
