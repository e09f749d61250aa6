"""Progress of a long job on standard error: a bar in a terminal, periodic lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Bar:
    """Progress bar with a text that is updated in a terminal, or printed periodically in a log."""

    def __init__(self, total: int, done: int = 0, *, seconds_between_lines: float) -> None:
        self._seconds_between_lines, self._last_line = seconds_between_lines, time.monotonic()
        console = Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)
        columns = BarColumn(), TextColumn("{task.description}", markup=False)
        self._is_bar = console.is_terminal
        self._rich = Progress(*columns, console=console, disable=not self._is_bar, speed_estimate_period=math.inf)
        self._rich.add_task("", total=total, completed=done)
        (self._task,) = self._rich.tasks
        self._rich.start()

    def advance_to(self, done: int) -> tuple[float | None, str]:
        """Advance to `done`; return units per second over the last 1000 calls (None at first) and the time left."""
        self._rich.update(self._task.id, completed=done)
        left = self._task.time_remaining
        return self._task.speed, "unknown" if left is None else str(timedelta(seconds=left))

    def show(self, text: str, *, is_due: bool = False) -> None:
        """Update the text; in a log, print it if it is due or the last line is `seconds_between_lines` old."""
        if self._is_bar:
            self._rich.update(self._task.id, description=text)
        elif is_due or time.monotonic() - self._last_line >= self._seconds_between_lines:
            self._last_line = time.monotonic()
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._rich.console.print(text)

    def close(self) -> None:
        """Stop the bar."""
        self._rich.stop()


def say(text: str, is_shown: bool = True) -> None:
    """Print a status line on standard error.

    Args:
        text: The line.
        is_shown: True on the one rank that prints.
    """
    if is_shown:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_bar(total: int, unit: str, job: str = "", is_shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a progress bar during the block; yield a function to call with the number of units done so far.

    Args:
        total: Total number of units.
        unit: Name of the units, such as tokens.
        job: Name of the job.
        is_shown: True on the one rank that shows the bar.
    """
    if not is_shown:
        yield lambda done: None
        return
    bar = Bar(total, seconds_between_lines=10.0)

    def show(done: int) -> None:
        speed, left = bar.advance_to(done)
        text = f"{job} {done:,} of {total:,} {unit}".lstrip()
        bar.show(f"{text}, {speed:,.0f}/s, {left} left" if speed else text)

    try:
        yield show
    finally:
        bar.close()
