"""End a program with one message for a user's error, and the exit code of its kind."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from megaft.base.errors import UserError
from megaft.base.unicode_text import escape_unencodable

REQUEUE, DO_NOT_REQUEUE = 75, 93
"""Exit codes that batch scripts look for: saved, to be requeued; and not to be requeued."""

SECONDS_FOR_MAIN = 20.0


def exit_code_of(function: Callable[..., int], *arguments: Any, is_main: bool = True) -> int:
    """Run `function`; return its exit code, or the code of the UserError it raised, whose message goes to stderr.

    Ctrl-C gives 130, and a reader of our output that went away (`| head`) 141, as shells count them. Anything else
    is a bug and keeps its traceback.

    Raises:
        SystemExit: From a parser of flags.

    Args:
        is_main: Whether this rank prints the message at once; another one waits for the main rank to have done so.
    """
    escape_unencodable(sys.stdout)
    try:
        try:
            return function(*arguments)
        finally:
            sys.stdout.flush()
    except UserError as error:
        if not is_main:
            # Most mistakes are found by every rank, and the first to leave makes the launcher end the others: the main
            # rank speaks and leaves first. Who is still here after that found something of its own.
            time.sleep(SECONDS_FOR_MAIN)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit:  # the parser's, of the same flags on every rank: the main one says what is wrong with them
        if not is_main:
            time.sleep(SECONDS_FOR_MAIN)
        raise
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python's last flush complains
        return 141
