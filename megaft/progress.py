"""How far a long job is: a bar with the time left on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counting(total: int, unit: str, what: str = "", is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the units done so far; all goes to stderr.

    Args:
        total: Units in all.
        unit: Their name, such as tokens.
        what: What is being done.
        is_shown: Whether this process speaks.
    """
    state = _State(total, unit, what)
    console = Console(stderr=True)
    if is_shown and console.is_terminal:
        with Progress(BarColumn(), TextColumn("{task.description}"), console=console) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done, description=state.at(done))
    elif is_shown:
        yield state.print_at
    else:
        yield lambda done: None


class _State:
    def __init__(self, total: int, unit: str, what: str) -> None:
        self.total, self.unit, self.what = total, unit, what
        self.first: tuple[float, int] | None = None  # what was done before, in no time, says nothing about speed
        self.spoke = time.monotonic()

    def at(self, done: int) -> str:
        now = time.monotonic()
        self.first = self.first or (now, done)
        text = f"{self.what} {done:,} of {self.total:,} {self.unit}".lstrip()
        seconds, since = now - self.first[0], done - self.first[1]
        if not since or not seconds:
            return text
        left = timedelta(seconds=round(seconds / since * (self.total - done)))
        return f"{text}, {since / seconds:,.0f}/s, {left} left"

    def print_at(self, done: int) -> None:
        text, now = self.at(done), time.monotonic()
        if now - self.spoke >= _SECONDS_BETWEEN_LINES:
            self.spoke = now
            print(text, file=sys.stderr, flush=True)
