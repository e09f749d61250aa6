"""Read and check the numbers of a model's config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaft.base.errors import DataError


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """A configuration and its source."""

    config: dict[str, Any]
    source: str
    """Its file, or a model's name."""

    def positive_int(self, key: str, default: int, null: Any = None) -> int:
        """Return a whole number of 1 or more.

        Args:
            key: Its name in the configuration.
            default: Where the configuration leaves it out.
            null: Where the configuration says null, if it may.

        Raises:
            DataError: Anything else.
        """
        found: Any = self.config.get(key, default)
        value = null if found is None else found
        self._require(type(value) is int and value >= 1, key, "a whole number of 1 or more")
        return value

    def fraction(self, key: str, default: float) -> float:
        """Return a number from 0 to less than 1; DataError for anything else."""
        value = self.config.get(key, default)
        self._require(type(value) in (int, float) and 0 <= value < 1, key, "a number from 0 to less than 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false; DataError for anything else."""
        value = self.config.get(key, default)
        self._require(isinstance(value, bool), key, "true or false")
        return value

    def require_multiple(self, key: str, value: int, of_key: str, of: int) -> None:
        """Raise DataError unless the size called `key` is a multiple of the one called `of_key`."""
        if value % of:
            raise DataError(
                f"{self.source}: {key} is {value} and {of_key} {of}; the first is a multiple of the second."
            )

    def _require(self, rule_holds: bool, key: str, rule: str) -> None:
        if not rule_holds:
            raise DataError(f"{self.source}: {key} is {self.config[key]!r}; it is {rule}.")
