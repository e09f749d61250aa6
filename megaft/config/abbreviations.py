"""Suggest the full flag when an unknown one has its initials: --optim.learning-rate for --optim.lr.

tyro suggests settings for misspelled flags, but not for initials.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import get_type_hints


@contextmanager
def suggesting(config: type, arguments: Sequence[str], *, is_shown: bool) -> Iterator[None]:
    """If the block's parser rejects the arguments, suggest the full flag for each one that has a setting's initials."""
    try:
        yield
    except SystemExit as error:
        for line in _suggestions(config, arguments) if error.code and is_shown else []:
            print(line, file=sys.stderr)
        raise


def _suggestions(config: type, arguments: Sequence[str]) -> list[str]:
    names = list(_flag_names(config))
    flags = [argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")]
    matches = {flag: [name for name in names if _abbreviates(flag, name)] for flag in flags if flag not in names}
    return [f"--{flag}: did you mean --{' or --'.join(settings)}?" for flag, settings in matches.items() if settings]


def _flag_names(config: type, prefix: str = "") -> Iterator[str]:
    """Yield every flag's name, such as optim.learning-rate."""
    hints = get_type_hints(config)
    for field in fields(config):
        name = prefix + field.name.replace("_", "-")
        if is_dataclass(hints[field.name]):
            yield from _flag_names(hints[field.name], f"{name}.")
        else:
            yield name


def _abbreviates(flag: str, name: str) -> bool:
    """Return True if a flag consists of a setting's initials, with or without its section."""
    section, _, words = name.rpartition(".")
    initials = "".join(word[0] for word in words.split("-"))
    return len(initials) > 1 and flag in (initials, f"{section}.{initials}")
