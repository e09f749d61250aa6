"""Entries of --data.train: `PREFIX` or `WEIGHT,PREFIX`."""

from __future__ import annotations

from megaft.base.errors import ConfigError


def parse_source(text: str) -> tuple[float | None, str]:
    """Return weight (None if not given) and prefix of an entry of --data.train."""
    weight, comma, name = text.partition(",")
    try:
        value = float(weight)
    except ValueError:
        return None, text
    if not comma or not name or not 0 < value < float("inf"):
        raise ConfigError(f"--data.train has {text!r}; use WEIGHT,PREFIX with a weight above 0, for example 0.7,books.")
    return value, name
