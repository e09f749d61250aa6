"""Read and validate the values of a model's config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaft.base.errors import DataError


@dataclass(frozen=True, slots=True)
class ConfigValues:
    """Validated access to a configuration's values."""

    config: dict[str, Any]
    source: str
    """The configuration's file, or the model's name, for messages."""

    def positive_int(self, key: str, default: int, null: Any = None) -> int:
        """Return a positive integer.

        Args:
            key: Its name in the configuration.
            default: Value if the key is missing.
            null: Value for null, if null is allowed.

        Raises:
            DataError: The value is not a positive integer.
        """
        raw: Any = self.config.get(key, default)
        value = null if raw is None else raw
        self._require(type(value) is int and value >= 1, key, "a whole number of 1 or more")
        return value

    def fraction(self, key: str, default: float) -> float:
        """Return a number from 0 to less than 1; DataError otherwise."""
        value = self.config.get(key, default)
        self._require(type(value) in (int, float) and 0 <= value < 1, key, "a number from 0 to less than 1")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean; DataError otherwise."""
        value = self.config.get(key, default)
        self._require(isinstance(value, bool), key, "true or false")
        return value

    def require_multiple(self, key: str, value: int, of_key: str, of: int) -> None:
        """Raise DataError unless `key`'s value is a multiple of `of_key`'s."""
        if value % of:
            raise DataError(
                f"{self.source}: {key} is {value} and {of_key} is {of}; the first must be a multiple of the second. "
                "Correct it, or copy the file again."
            )

    def _require(self, rule_holds: bool, key: str, rule: str) -> None:
        if not rule_holds:
            raise DataError(
                f"{self.source}: {key} is {self.config[key]!r}; it must be {rule}. Correct it, or copy the file again."
            )
