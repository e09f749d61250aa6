"""Entries of --data.train: `PREFIX` or `WEIGHT,PREFIX`."""

from __future__ import annotations

from megaft.base.errors import ConfigError


def parse_source(text: str) -> tuple[float | None, str]:
    """Read `PREFIX` or `WEIGHT,PREFIX`."""
    weight, comma, name = text.partition(",")
    try:
        value = float(weight)
    except ValueError:
        return None, text
    if not comma or not name or not 0 < value < float("inf"):
        raise ConfigError(
            f"--data.train has {text!r}; a pair is WEIGHT,PREFIX with a weight above 0, such as 0.7,books."
        )
    return value, name
