"""Progress display of a run: a bar in a terminal, or periodic lines in a log."""

from __future__ import annotations

from typing import Any

from megaft.base.progress import Bar


class Terminal:
    """Display of metrics rows on standard error."""

    def __init__(self, first_step: int, max_steps: int) -> None:
        self._first_step, self._max_steps = first_step, max_steps
        self._bar = Bar(max_steps, first_step, seconds_between_lines=2.0)

    def log(self, row: dict[str, Any]) -> None:
        """Show a row: every validation and, in a log, at most a step every two seconds besides the first and last."""
        step = row["step"]
        head = f"step {step}/{self._max_steps}"
        if "validation" in row:
            self._bar.say(f"{head}  validation: {_numbers(row['validation'])}")
        else:
            _, left = self._bar.advance_to(step)
            is_due = step in (self._first_step + 1, self._max_steps)
            self._bar.show(f"{head}  {_summary(row)}  ETA {left}", is_due=is_due)

    def close(self, failed: bool = False) -> None:
        """Stop updating the bar."""
        self._bar.close()


def _summary(row: dict[str, Any]) -> str:
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    return f"loss {row['loss']:.4f}  lr {row['learning_rate']:.2e}  {row['tokens_per_second']:,.0f} tok/s{mfu}"


def _numbers(values: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.6g}" for name, value in values.items() if isinstance(value, int | float))
