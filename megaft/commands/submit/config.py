"""Settings of `megaft submit`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import tyro

from megaft.base.checks import at_least, require, require_ranges
from megaft.commands.submit.batch_script import require_one_line
from megaft.commands.submit.job_check import ARRAY
from megaft.commands.submit.walltime import WALLTIME

MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Fill in a SLURM batch script and submit it: `megaft submit [flags] SCRIPT -- flags of its program`.

    Options that are not given keep the script's values.
    """

    script: tyro.conf.Positional[str]
    """Name of a recipe in slurm/, such as finetune_1node, or path of a batch script."""
    print: bool = False
    """Print the script instead of submitting it."""
    nodes: int | None = None
    """Number of nodes."""
    gpus_per_node: int | None = None
    """GPUs on each node, with one rank per GPU; 0 for nodes without GPUs."""
    ntasks_per_node: int | None = None
    """Ranks on each node. By default the number of GPUs."""
    cpus_per_task: int | None = None
    """CPU cores for each rank."""
    time: str | None = None
    """Time limit, after which the job is requeued: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS."""
    mem: str | None = None
    """Memory of each node, such as 64G; 0 for all of it."""
    partition: str | None = None
    """SLURM partition, as listed by `sinfo`."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """SLURM quality of service (QOS) that your account may use."""
    job_name: str | None = None
    """Name of the job in the queue."""
    array: str | None = None
    """Array tasks, such as 1-6%2 (two at a time). finetune_sweep has one task for each line of its file."""

    def __post_init__(self) -> None:
        one = at_least(1)
        require_ranges(self, nodes=one, gpus_per_node=at_least(0), ntasks_per_node=one, cpus_per_task=one)
        for field in fields(self):
            require_one_line(f"--{_option_name(field.name)}", str(getattr(self, field.name)))
        require(
            self.time is None
            or (WALLTIME.fullmatch(self.time) is not None and re.search("[1-9]", self.time) is not None),
            f"--time is {self.time!r}; use MINUTES, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, "
            "for example 12:00:00.",
        )
        require(
            self.mem is None or MEMORY.fullmatch(self.mem) is not None, f"--mem is {self.mem!r}; use 64G, 500M or 0."
        )
        require(
            self.array is None or ARRAY.fullmatch(self.array) is not None,
            f"--array is {self.array!r}; use numbers and ranges of tasks, such as 1-6, 1,3,5-9 or 1-6%2.",
        )

    def directives(self) -> dict[str, str]:
        """Return the values of the given #SBATCH options by name."""
        names = [field.name for field in fields(self) if field.name not in ("script", "print")]
        given = {_option_name(name): str(value) for name in names if (value := getattr(self, name)) is not None}
        if self.gpus_per_node:
            given.setdefault("ntasks-per-node", str(self.gpus_per_node))  # one rank per GPU
        return given


def _option_name(name: str) -> str:
    return name.replace("_", "-")
