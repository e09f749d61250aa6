"""Check the name of a detokenizer."""

from __future__ import annotations

import detokenizers

from megaft.base.checks import require


def require_detokenizer(setting: str, name: str) -> None:
    """Raise ConfigError, with the setting, for a detokenizer that does not exist."""
    names = detokenizers.names()
    require(name in names, f"{setting} is {name!r}; use one of {', '.join(names)}.")
