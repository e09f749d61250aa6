"""Rank, local rank and world size from the launcher's environment variables."""

from __future__ import annotations

import re
import secrets
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megaft.base.errors import ConfigError

# Launcher, the variable that identifies it, and the variables of rank, local rank and world size.
# OpenMPI and MPICH come before SLURM, because inside a job mpirun starts its daemons with srun. For SLURM use the
# step's variables: in a shell of `salloc -n 4`, which is a step of one task, SLURM_NTASKS is still 4.
LAUNCHERS = (
    ("torch", "RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    ("openmpi", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("mpich", "MPI_LOCALRANKID", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    ("slurm", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True, slots=True)
class Topology:
    """Rank, local rank and world size of this process."""

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """True if this rank writes files and prints."""
        return self.rank == 0


def discover(environment: Mapping[str, str]) -> Topology:
    """Return the topology from the launcher's environment variables; without any, the world is this process."""
    for launcher, marker, *names in LAUNCHERS:
        if marker in environment:
            rank, local_rank, world_size = (integer(environment, name) for name in names)
            return Topology(launcher, rank, local_rank, world_size, *_master(launcher, world_size, environment))
    return Topology("python", 0, 0, 1, "127.0.0.1", free_port())


def is_main_of(environment: Mapping[str, str]) -> bool:
    """Return True if the environment variables are those of the main rank."""
    ranks = [environment.get(rank) for _, marker, rank, *_ in LAUNCHERS if marker in environment]
    return not ranks or ranks[0] == "0"


def integer(environment: Mapping[str, str], name: str) -> int:
    """Return an environment variable as a non-negative integer, or raise ConfigError."""
    value = environment.get(name, "")
    if not value.isdigit():
        raise ConfigError(
            f"the launcher's variable {name} is {value!r}; it must be an integer of 0 or more. "
            "Start the ranks with deepspeed, torchrun, srun or mpirun."
        )
    return int(value)


def _master(launcher: str, world_size: int, environment: Mapping[str, str]) -> tuple[str, int]:
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return environment["MASTER_ADDR"], integer(environment, "MASTER_PORT")
    if launcher == "torch":
        raise ConfigError(
            "RANK is set, but MASTER_ADDR or MASTER_PORT is not; start the ranks with deepspeed or torchrun."
        )
    if launcher == "slurm" and world_size == 1:
        return "127.0.0.1", free_port()
    if launcher == "slurm":
        # All tasks of a step derive the same port; two steps or jobs on a node very rarely share one.
        number = int(environment["SLURM_JOB_ID"]) + 101 * integer(environment, "SLURM_STEP_ID")
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        return first_host(nodes), 20_000 + number % 20_000
    return _agree_over_mpi()


def first_host(nodelist: str) -> str:
    """Return the first name of a SLURM node list, such as n07 of n[07-09,12],login."""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodelist)
    assert match, nodelist
    return "".join(part or "" for part in match.groups())


def _agree_over_mpi() -> tuple[str, int]:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError("mpirun started this process, but mpi4py is not installed; install megaft[mpi].") from error
    return MPI.COMM_WORLD.bcast((socket.gethostname(), free_port()), root=0)


LOWEST_PORT = 10_000
"""Lowest port that `free_port` chooses."""
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""File with the first and last of Linux's ephemeral ports."""


def free_port() -> int:
    """Return a free port, outside the ephemeral range if possible.

    The operating system assigns ephemeral ports to other programs, perhaps before a rank listens on the port, seconds
    later.

    Raises:
        ConfigError: No port is free.
    """
    end = int(EPHEMERAL_PORTS.read_text().split()[0]) if EPHEMERAL_PORTS.exists() else 2**15
    candidates = [LOWEST_PORT + secrets.randbelow(end - LOWEST_PORT) for _ in range(100) if end > LOWEST_PORT]
    for port in (*candidates, 0):  # 0: any free port
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return listener.getsockname()[1]
    raise ConfigError("no TCP port is free on this machine; stop programs that hold ports.")


def own_flags(arguments: list[str] | None = None) -> list[str]:
    """Return the flags (by default the command line's) without the --local_rank=N that the deepspeed launcher adds.

    `discover` reads the rank from the environment instead.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    return [argument for argument in arguments if not argument.startswith("--local_rank=")]
