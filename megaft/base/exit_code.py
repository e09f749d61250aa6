"""Run a program and convert user errors to a message on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from megaft.base.errors import UserError
from megaft.base.unicode_text import escape_unencodable

SECONDS_FOR_MAIN = 60.0
"""Seconds that other ranks wait for the main rank to print the error and exit; busy machines import that unevenly."""


def exit_code_of(function: Callable[..., int], *arguments: Any, is_main: bool = True) -> int:
    """Run `function`; return its exit code, or the code of the UserError it raised, whose message goes to stderr.

    Ctrl-C gives 130, and a closed output pipe (`| head`) 141, as in shells. Any other exception is a bug and keeps its
    traceback.

    Args:
        function: The program.
        arguments: Its arguments.
        is_main: True if this rank prints the message at once; other ranks give the main rank time to print it first.

    Raises:
        SystemExit: From the parser of flags.
    """
    escape_unencodable(sys.stdout)
    try:
        try:
            return function(*arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if not is_main:
            # Most errors occur on every rank, and the launcher kills the others when the first exits: the main rank
            # prints and exits first. A rank that is still alive after that has a different error.
            time.sleep(SECONDS_FOR_MAIN)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit:  # bad flags: every rank has the same ones, so the main rank alone prints the error
        if not is_main:
            time.sleep(SECONDS_FOR_MAIN)
        raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's flush at exit raises
        return 141


def print_help(parse: Callable[[list[str]], object], arguments: list[str]) -> int:
    """Print the help of a parser, which raises SystemExit; call it by `exit_code_of`, which handles closed pipes."""
    parse(arguments)
    return 0
