"""A run as its user watches it: a progress bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 2.0


class Terminal:
    """Shows rows of metrics on standard error."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self._first_step, self._max_steps = first_step, max_steps
        self._begin = time.perf_counter()
        self._last_line = -SECONDS_BETWEEN_LINES
        self._bar = None
        if sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=max_steps, completed=first_step)
            self._bar.start()

    def log(self, row: dict[str, Any]) -> None:
        """Show a row: every validation and, in a log, at most a step every two seconds besides the first and last."""
        step = row["step"]
        if "validation" in row:
            self._line(f"step {step}/{self._max_steps}  validation: {_numbers(row['validation'])}")
        elif self._bar:
            self._bar.update(self._task, completed=step, description=_summary(row))
        elif step == self._max_steps or time.perf_counter() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            self._line(f"step {step}/{self._max_steps}  {_summary(row)}  ETA {self._remaining(step)}")

    def close(self, failed: bool = False) -> None:
        """Leave the bar as it stands."""
        if self._bar:
            self._bar.stop()

    def _line(self, text: str) -> None:
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def _remaining(self, step: int) -> timedelta:
        per_step = (time.perf_counter() - self._begin) / max(1, step - self._first_step)
        return timedelta(seconds=round((self._max_steps - step) * per_step))


def _summary(row: dict[str, Any]) -> str:
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    return f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s{mfu}"


def _numbers(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in values.items() if isinstance(value, int | float))
