"""Exit code and reason of a failed rank, as messages between ranks."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from megaft.base.errors import CRASH, REQUEUE, LostPeerError, UserError, kind_of

MAX_REASON_LENGTH = 4000
"""Maximum characters of a reason that is sent."""


class Ending(NamedTuple):
    """A rank's exit code and reason; REQUEUE means that the rank was lost, or that its disk or network failed."""

    rank: int
    exit_code: int
    reason: str

    def to_line(self) -> bytes:
        """Return the ending as one line of JSON."""
        return json.dumps([self.rank, self.exit_code, self.reason[:MAX_REASON_LENGTH]]).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Ending:
        """Parse a line written by `to_line`."""
        return cls(*json.loads(line))

    @property
    def is_resumable(self) -> bool:
        """True if the run can resume from its checkpoint: a rank was killed, became unreachable or lost its disk."""
        return self.exit_code == REQUEUE

    def message_on(self, rank: int) -> str:
        """Return the message that another rank, `rank`, prints."""
        if not self.is_resumable:
            return f"rank {self.rank}: {self.reason}"
        return (
            f"rank {rank} lost its peers (rank {self.rank}: {self.reason}); see that rank's error, if it "
            "printed one. The same command resumes from the last checkpoint."
        )

    def error_on(self, rank: int) -> UserError:
        """Return the error that another rank, `rank`, raises."""
        return kind_of(self.exit_code)(self.message_on(rank))


def ending_of(rank: int, error: BaseException) -> Ending | None:
    """Return the ending to send to other ranks; None if they detect it themselves, or the user interrupted the run.

    A disk or network failure (OSError) may be transient, so its code is REQUEUE. The other ranks detect a lost peer
    themselves, and a failed GPU (torch.AcceleratorError, which a lost peer causes too).
    """
    if isinstance(error, UserError):
        return None if isinstance(error, LostPeerError) else Ending(rank, error.exit_code, str(error))
    if not isinstance(error, Exception) or _is_device_error(error):
        return None
    lines: list[Any] = str(error).splitlines() or [""]
    exit_code = REQUEUE if isinstance(error, OSError) else CRASH
    return Ending(rank, exit_code, f"{type(error).__name__}: {lines[0]}")


def _is_device_error(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.AcceleratorError)
