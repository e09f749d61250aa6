"""Settings of `megaft doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Check this machine's installation: exit code 0, or 2 where something must be mended first.

    With --distributed, started by deepspeed, torchrun, srun or mpirun, try communication, ZeRO stages 0 to 3 and an
    elastic resume on all ranks with a toy model: exit code 0, or 5 where numbers are wrong.
    """

    distributed: bool = False
    """Test the ranks that a launcher started, instead of this machine."""
    folder: Path = Path()
    """With --distributed: a folder that all ranks share. What is written in it is removed at the end."""
    json: bool = False
    """Print one line of JSON instead of a table."""
