"""Agreement of all ranks on a text or an error, so that none waits for another that has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from megaft.base import parallel
from megaft.base.errors import UserError, kind_of

T = TypeVar("T")

AGREED_BYTES = 1000
"""Most UTF-8 bytes of a text that `agreed` exchanges."""


def agreed(text: str) -> str:
    """Return, on every rank, the text of the last rank that has one; it is cut to AGREED_BYTES."""
    speaker = parallel.max_over_ranks([parallel.rank() if text else -1])[0]
    if speaker < 0:
        return ""
    mine = text.encode(errors="backslashreplace") if speaker == parallel.rank() else b""
    letters = parallel.max_over_ranks([*mine[:AGREED_BYTES].ljust(AGREED_BYTES, b"\0")])
    return bytes(letters).rstrip(b"\0").decode(errors="replace")


def raise_together(error: UserError | None) -> None:
    """Raise on every rank where any has an error: its own where a rank has one, elsewhere that of the last such rank.

    Every rank has the message: a launcher may end the rank that found it before it has spoken.

    Raises:
        UserError: With the exit code of the error, so that whichever rank leaves first gives the launcher that one.
    """
    said = agreed(f"{error.exit_code} rank {parallel.rank()}: {error}" if error else "")
    if error:
        raise error
    if said:
        code, _, message = said.partition(" ")
        raise kind_of(int(code))(message)


def raise_from_anywhere(error: UserError) -> NoReturn:
    """Raise an error on every rank, also on those in another collective; without a heartbeat, `raise_together`."""
    if not parallel.tell_others(error):
        raise_together(error)
    raise error


def together(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on every rank; where one raises a UserError, all do, so that none waits for another.

    The function itself may not communicate: a rank that raised would not take part.
    """
    result, error = None, None
    try:
        result = function(*arguments)
    except UserError as caught:
        error = caught
    raise_together(error)
    return cast(T, result)


def main_first(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function on the main rank, then on the others, which find its downloads and files; as `together`."""
    first = together(lambda: function(*arguments) if parallel.is_main() else None)
    return together(lambda: cast(T, first) if parallel.is_main() else function(*arguments))
