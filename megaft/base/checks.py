"""Ranges of numeric settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megaft.base.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Range:
    """Range of finite values of a numeric setting."""

    text: str
    holds: Callable[[float], bool]

    def such_as(self, example: str) -> Range:
        """Return the range with an example value for messages."""
        return Range(f"{self.text}, for example {example}", self.holds)


def at_least(least: int) -> Range:
    """Return the range of integers of at least `least`."""
    return Range(f"{least} or more", lambda value: value >= least)


NOT_NEGATIVE = Range("a finite number of 0 or more", lambda value: value >= 0)
ABOVE_0 = Range("a finite number above 0", lambda value: value > 0)
BELOW_1 = Range("0 or more and less than 1", lambda value: 0 <= value < 1)
UP_TO_1 = Range("0 to 1", lambda value: 0 <= value <= 1)
SEED = Range("0 or more and less than 2^63", lambda value: 0 <= value < 2**63)


def require_ranges(settings: Any, section: str = "", **ranges: Range) -> None:
    """Raise ConfigError for the first field outside its range; None (a default) is always allowed.

    Args:
        settings: Object with the fields.
        section: Prefix of the flags, such as `optim.` in `--optim.beta1`.
        ranges: Allowed range by field name.
    """
    for name, numbers in ranges.items():
        value = getattr(settings, name)
        if value is not None and not (abs(value) < math.inf and numbers.holds(value)):
            raise ConfigError(f"--{section}{name.replace('_', '-')} is {value}; use {numbers.text}.")


def require(rule_holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the rule holds."""
    if not rule_holds:
        raise ConfigError(message)
