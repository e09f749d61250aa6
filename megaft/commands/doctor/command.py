"""`megaft doctor`: check this machine's installation, or with --distributed the ranks of a launcher.

megaft doctor
deepspeed --module megaft doctor --distributed
srun python -m megaft doctor --distributed
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import tyro

from megaft.base.exit_code import exit_code_of
from megaft.base.topology import own_flags
from megaft.commands.doctor.config import DoctorConfig

if TYPE_CHECKING:
    from megaft.base.parallel import Topology


def main(arguments: list[str] | None = None) -> int:
    """Run the checks, print the results, and return the exit code."""
    flags = own_flags(arguments)
    if "--distributed" in flags and not {"-h", "--help"} & {*flags}:
        from megaft.base import parallel

        return parallel.exit_code_on_ranks(lambda topology: _run(parse(flags, topology.is_main), topology))
    config = parse(flags)
    from megaft.commands.doctor import machine

    return machine.run(config.json)


def parse(flags: list[str], is_main: bool = True) -> DoctorConfig:
    """Parse the flags; on a bad one exit with code 2, and print the rule on the main rank only."""
    return tyro.cli(DoctorConfig, args=flags, prog="megaft doctor", console_outputs=is_main)


def _run(config: DoctorConfig, topology: Topology) -> int:
    from megaft.commands.doctor import ranks

    return ranks.run(config.folder, config.json, topology)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
