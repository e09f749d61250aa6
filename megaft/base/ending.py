"""Exit code and reason of a rank that ends, as ranks send them to each other."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from megaft.base.errors import LostPeerError, UserError, kind_of
from megaft.base.exit_code import REQUEUE

CRASH = 1
"""Python's exit code of an exception that nobody caught."""
LONGEST_REASON = 4000


class Ending(NamedTuple):
    """A rank's exit code and reason; REQUEUE is the code of one that was lost, or whose disk or network failed."""

    rank: int
    exit_code: int
    reason: str

    def to_line(self) -> bytes:
        """Return it as one line of JSON."""
        return json.dumps([self.rank, self.exit_code, self.reason[:LONGEST_REASON]]).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Ending:
        """Read what `to_line` wrote."""
        return cls(*json.loads(line))

    @property
    def is_loss(self) -> bool:
        """True where the run may continue from its checkpoint: a rank was killed, out of reach, or lost its disk."""
        return self.exit_code == REQUEUE

    def message_on(self, rank: int) -> str:
        """Return the message that another rank ends with."""
        if not self.is_loss:
            return f"rank {self.rank}: {self.reason}"
        return (
            f"rank {rank} lost its peers (rank {self.rank}: {self.reason}); its own message says why, if it had time "
            "for one. The same command continues from the last checkpoint."
        )

    def error_on(self, rank: int) -> UserError:
        """Return the error that another rank raises."""
        return kind_of(self.exit_code)(self.message_on(rank))


def ending_of(rank: int, error: BaseException) -> Ending | None:
    """Return how an error ends a rank; None where others find that out by themselves, or the user ended it.

    A disk or network that fails (OSError) may serve again, so the code is REQUEUE. A lost peer, and a GPU that fails
    (torch.AcceleratorError, which a lost peer causes too), are found by the others.
    """
    if isinstance(error, UserError):
        return None if isinstance(error, LostPeerError) else Ending(rank, error.exit_code, str(error))
    if not isinstance(error, Exception) or _is_of_the_device(error):
        return None
    lines: list[Any] = str(error).splitlines() or [""]
    exit_code = REQUEUE if isinstance(error, OSError) else CRASH
    return Ending(rank, exit_code, f"{type(error).__name__}: {lines[0]}")


def _is_of_the_device(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.AcceleratorError)
