"""Synchronize errors and short texts over all ranks, so that no rank waits for a failed one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from megaft.base import parallel
from megaft.base.errors import UserError, kind_of

T = TypeVar("T")

AGREED_BYTES = 1000
"""Maximum UTF-8 bytes of a text that `agreed` exchanges."""


def agreed(text: str) -> str:
    """Return, on every rank, the non-empty text of the highest rank, truncated to AGREED_BYTES."""
    sender = parallel.max_over_ranks([parallel.rank() if text else -1])[0]
    if sender < 0:
        return ""
    own_bytes = text.encode(errors="backslashreplace") if sender == parallel.rank() else b""
    received = parallel.max_over_ranks([*own_bytes[:AGREED_BYTES].ljust(AGREED_BYTES, b"\0")])
    return bytes(received).rstrip(b"\0").decode(errors="replace")


def raise_together(error: UserError | None) -> None:
    """Raise on every rank if any rank has an error: the rank's own, or else that of the highest failing rank.

    Every rank reports the error, since a launcher may kill the failing rank before it prints its message.

    Raises:
        UserError: With the exit code of the error, so that the launcher sees this code whichever rank exits first.
    """
    message = agreed(f"{error.exit_code} rank {parallel.rank()}: {error}" if error else "")
    if error:
        raise error
    if message:
        code, _, text = message.partition(" ")
        raise kind_of(int(code))(text)


def raise_from_anywhere(error: UserError) -> NoReturn:
    """Raise an error on every rank, through the heartbeat; if there is none, through `raise_together`."""
    if not parallel.tell_others(error):
        raise_together(error)
    raise error


def together(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on every rank; if any rank raises a UserError, all ranks do.

    The function must not call collectives, which would hang after a rank has raised.
    """
    result, error = None, None
    try:
        result = function(*arguments)
    except UserError as caught:
        error = caught
    raise_together(error)
    return cast(T, result)


def main_first(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on the main rank, then on the others, which reuse its downloads; errors as in `together`."""
    first = together(lambda: function(*arguments) if parallel.is_main() else None)
    return together(lambda: cast(T, first) if parallel.is_main() else function(*arguments))
