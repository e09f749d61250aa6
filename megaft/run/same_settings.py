"""Check that all ranks have the same settings and data; only the main rank's are recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch

from megaft.base import parallel
from megaft.base.agreement import raise_together
from megaft.base.errors import ConfigError
from megaft.base.redaction import without_secrets
from megaft.config.flags import flags_of
from megaft.config.train import TrainConfig

COMPARED_BY_CONTENT = ("--data.train", "--data.valid", "--data.tokenizer", "--model.path", "--model.from-scratch")
"""Settings that name files, which may lie elsewhere on another host."""

UNREADABLE = "unreadable"
"""Stands for the content of a file that a rank cannot read. It is not compared, since loading reports the error."""


def settings_of(config: TrainConfig, contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that must be equal on all ranks, by their name in messages.

    Args:
        config: The rank's settings.
        contents: Contents of the named files, such as a hash of the samples, in place of their paths.
    """
    flags = flags_of(TrainConfig)
    settings = {
        f"--{flags[f'{section}.{name}']}": value
        for section, values in asdict(config).items()
        if isinstance(values, dict)
        for name, value in values.items()
    }
    named = {
        name: None if value is None else "given" for name, value in settings.items() if name in COMPARED_BY_CONTENT
    }
    return settings | named | dict(contents)


def require_same(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError on every rank if a rank's settings differ from the main rank's.

    Args:
        settings: Values by name; the names are the same on all ranks.
    """
    hashes = torch.tensor([_hash(value) for value in settings.values()])
    of_main = parallel.broadcast_from_main(hashes)
    differs = ((hashes != of_main) & (hashes != 0) & (of_main != 0)).tolist()
    names = [name for name, is_other in zip(settings, differs, strict=True) if is_other]
    raise_together(settings_error(names, settings) if names else None)


def settings_error(names: list[str], settings: Mapping[str, Any]) -> ConfigError:
    """Return the error of a rank whose settings differ from the main rank's, with secrets redacted."""
    more = f" (so are {', '.join(names[1:])})" if names[1:] else ""
    value = without_secrets(str(settings[names[0]]))
    return ConfigError(
        f"{names[0]} is {value:.200} here but different on rank 0{more}; start all ranks with the same "
        "command and the same files."
    )


def _hash(value: Any) -> int:
    """Return a 56-bit hash of the value, which fits a signed 64-bit integer; 0 for an unreadable file."""
    if value is UNREADABLE:
        return 0
    return int.from_bytes(sha256(json.dumps(value, default=str, sort_keys=True).encode()).digest()[:7])
