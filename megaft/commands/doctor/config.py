"""Settings of `megaft doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Check this machine's installation. Exit code 0 if every check passes, or 2 if something must be fixed first.

    With --distributed, under deepspeed, torchrun, srun or mpirun: test communication, ZeRO stages 0 to 3 and an elastic
    resume on all ranks with a toy model. Exit code 0 if every check passes; 5 if a number is wrong; 2 if ranks have
    different versions or no shared folder; 75 if a rank does not answer within a minute.
    """

    distributed: bool = False
    """Test the ranks that a launcher started, instead of this machine."""
    folder: Path = Path()
    """With --distributed: a folder that all ranks share. Temporary files in it are removed at the end."""
    json: bool = False
    """Print one line of JSON instead of a table."""
