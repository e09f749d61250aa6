"""Progress of a long job on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Bar:
    """Shows a text, in front of it a bar where there is a terminal."""

    def __init__(self, total: int, done: int = 0, *, seconds_between_lines: float) -> None:
        self._seconds_between_lines, self._spoke = seconds_between_lines, time.monotonic()
        console, self._bar = Console(stderr=True), None
        if console.is_terminal:
            self._bar = Progress(BarColumn(), TextColumn("{task.description}", markup=False), console=console)
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def show(self, done: int, text: str, *, is_due: bool = False) -> None:
        """Move on; without a bar this is a line, where one is due."""
        if self._bar:
            self._bar.update(self._task, completed=done, description=text)
        elif is_due or time.monotonic() - self._spoke >= self._seconds_between_lines:
            self._spoke = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """Show a text that stays."""
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar:
            self._bar.stop()


@contextmanager
def counting(total: int, unit: str, what: str = "", is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the units done so far.

    Args:
        total: Units in all.
        unit: Their name, such as tokens.
        what: What is being done.
        is_shown: Whether this process speaks.
    """
    if not is_shown:
        yield lambda done: None
        return
    bar = Bar(total, seconds_between_lines=10.0)
    begin = None  # what was done before, in no time, says nothing about speed

    def show(done: int) -> None:
        nonlocal begin
        now = time.monotonic()
        begin = begin or (now, done)
        seconds, since = now - begin[0], done - begin[1]
        text = f"{what} {done:,} of {total:,} {unit}".lstrip()
        if since and seconds:
            left = timedelta(seconds=round(seconds / since * (total - done)))
            text = f"{text}, {since / seconds:,.0f}/s, {left} left"
        bar.show(done, text)

    try:
        yield show
    finally:
        bar.close()
