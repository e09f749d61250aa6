"""Results of the doctor's checks, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megaft.base.errors import ConfigError, NumericsError
from megaft.base.files import to_json

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "none": "dim"}
LOG_WIDTH = 120
"""Width in characters if the output is not a terminal, as in a batch job's log."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    status: Literal["pass", "warn", "fail", "none"]
    """Outcome; "none" means absent but not required."""
    found: str
    fix: str = ""
    is_numeric: bool = False
    """True if a failure means wrong numbers rather than a wrong installation."""


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0, or 5 if a number is wrong, or 2 if another check failed."""
    failed = [check for check in checks if check.status == "fail"]
    if any(check.is_numeric for check in failed):
        return NumericsError.exit_code
    return ConfigError.exit_code if failed else 0


def show(title: str, checks: Sequence[Check], as_json: bool, **more: Any) -> None:
    """Print the table and the count of each status; or one line of JSON, which also includes `more`."""
    if as_json:
        print(to_json({"ok": exit_code(checks) == 0, "checks": [asdict(check) for check in checks], **more}))
        return
    table = Table("check", "status", "found", title=title, title_justify="left")
    for check in checks:
        text = f"{check.found}. {check.fix}" if check.fix else check.found
        table.add_row(check.name, f"[{STYLES[check.status]}]{check.status}", Text(text))  # Text: no markup
    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH
    console.print(table)
    counts = [(status, sum(check.status == status for check in checks)) for status in ("pass", "warn", "fail")]
    console.print(", ".join(f"{count} {status}" for status, count in counts), highlight=False)
