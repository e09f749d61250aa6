"""How far a long read is: a bar with the time left on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def reading(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the bytes read so far; all goes to stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(total_bytes)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda done: bar.update(task, completed=done)


def _line_printer(total_bytes: int) -> Callable[[int], None]:
    began = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and done:
            last = now
            left = (now - began) * (total_bytes - done) / done
            print(f"{done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB, {left:.0f} s left", file=sys.stderr, flush=True)

    return show
