"""Table of guard policies: one entry per action on a bad step.

To add one, add an entry: `run/guard.py`, `run/recovery.py` and the training loop read its fields, not its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """Action on a bad step."""

    is_watched: bool = True
    """False if bad steps are not detected."""
    moves_weights: bool = False
    """True if the bad step updates the weights like any other."""
    then: Literal["go on", "end", "go back"]
    """Continue with the next step; end the run with exit code 5; or return to the last checkpoint without the step's
    samples."""

    @property
    def skips(self) -> bool:
        """True if the step's update is discarded, so that the guard must decide before it."""
        return self.then == "go on" and not self.moves_weights


POLICIES: dict[str, Policy] = {
    "ignore": Policy(is_watched=False, moves_weights=True, then="go on"),
    "stop": Policy(then="end"),
    "skip": Policy(then="go on"),
    "rewind": Policy(then="go back"),
}
STOP = "stop"
"""Policy that overrides the others for an overflow at the smallest loss scale, or too many skipped steps."""

if TYPE_CHECKING:
    SpikePolicy = NonFinitePolicy = str
else:
    SpikePolicy = Literal[*POLICIES]
    NonFinitePolicy = Literal[*(name for name, policy in POLICIES.items() if not policy.moves_weights)]
