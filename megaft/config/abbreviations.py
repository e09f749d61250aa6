"""Suggest the full flag when an unknown one has its initials: --optim.learning-rate for --optim.lr.

tyro suggests settings for misspelled flags, but not for initials.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megaft.config.flags import flags_of


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
    names = list(flags_of(config).values())
    flags = [argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")]
    matches = {flag: [name for name in names if _abbreviates(flag, name)] for flag in flags if flag not in names}
    return [f"--{flag}: did you mean --{' or --'.join(settings)}?" for flag, settings in matches.items() if settings]


def _abbreviates(flag: str, name: str) -> bool:
    """Return True if a flag consists of a setting's initials, with or without its section."""
    section, _, words = name.rpartition(".")
    initials = "".join(word[0] for word in words.split("-"))
    return len(initials) > 1 and flag in (initials, f"{section}.{initials}")
