"""`megaft doctor`: what this machine has and lacks. With --distributed, whether ranks on it compute rightly.

megaft doctor
deepspeed --module megaft.doctor --distributed
srun python -m megaft.doctor --distributed
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megaft.config import own_flags


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """Say what this machine has and lacks: exit code 0, or 2 where something must be mended first.

    With --distributed, started by deepspeed, torchrun, srun or mpirun, try communication, ZeRO stages 0 to 3 and an
    elastic resume on all ranks with a toy model: exit code 0, or 5 where numbers are wrong.
    """

    distributed: bool = False
    """Try the ranks that a launcher started, instead of looking at this machine."""
    folder: Path = Path()
    """With --distributed: a folder that all ranks share. What is written in it is removed at the end."""
    json: bool = False
    """Print one line of JSON instead of a table."""


def main(arguments: list[str] | None = None) -> int:
    """Look, print, and return the exit code."""
    config = tyro.cli(DoctorConfig, args=own_flags(arguments), prog="megaft doctor")
    if config.distributed:
        from megaft import doctor_ranks, parallel

        return parallel.exit_code_on_ranks(lambda topology: doctor_ranks.run(config.folder, config.json, topology))
    from megaft import doctor_machine

    return doctor_machine.run(config.json)


if __name__ == "__main__":
    sys.exit(main())
