"""`megaft submit`: fill in one of the batch scripts of slurm/ and hand it to SLURM, or print it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields

import tyro

from megaft.batch_script import directives_of, fill_in, find_script, read_script, require_one_line
from megaft.config import require
from megaft.job_check import ARRAY, SWEEP, check_program, sweep_lines
from megaft.ranges import at_least, require_ranges

_SIXTY = r"[0-5]?\d"
WALLTIME = re.compile(
    rf"\d+ | \d+:{_SIXTY} | \d+:{_SIXTY}:{_SIXTY} | \d+-(?:[01]?\d|2[0-3])(?::{_SIXTY}){{0,2}}", re.VERBOSE
)
MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitConfig:
    """Fill in a batch script and submit it: `megaft submit [flags] SCRIPT -- what its program takes`.

    Flags that are not given keep what the script says.
    """

    script: tyro.conf.Positional[str]
    """A recipe of slurm/, such as finetune_1node, or the path of a batch script."""
    print: bool = False
    """Print the script instead of submitting it."""
    nodes: int | None = None
    """Number of nodes."""
    gpus_per_node: int | None = None
    """GPUs, and ranks, on each node; 0 for nodes without."""
    ntasks_per_node: int | None = None
    """Ranks on each node, where they are not its GPUs."""
    cpus_per_task: int | None = None
    """Cores for each rank."""
    time: str | None = None
    """Time limit, after which the job goes back into the queue: MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS."""
    mem: str | None = None
    """Memory of each node, such as 64G; 0 for all it has."""
    partition: str | None = None
    """Partition, one of `sinfo`'s."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service, one of those your account has."""
    job_name: str | None = None
    """Name in the queue."""
    array: str | None = None
    """Tasks of the array, such as 1-6%2 (two at a time). finetune_sweep has one for each line of its file."""

    def __post_init__(self) -> None:
        one = at_least(1)
        require_ranges(self, nodes=one, gpus_per_node=at_least(0), ntasks_per_node=one, cpus_per_task=one)
        for field in fields(self):
            require_one_line(_flag(field.name), str(getattr(self, field.name)))
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
        """Return the #SBATCH options that were given, and their values."""
        names = [field.name for field in fields(self) if field.name not in ("script", "print")]
        given = {_flag(name): str(value) for name in names if (value := getattr(self, name)) is not None}
        if self.gpus_per_node:
            given.setdefault("ntasks-per-node", str(self.gpus_per_node))  # one rank a GPU
        return given


def main(arguments: list[str]) -> int:
    """Run the command: flags, `--`, and what the script's program takes. Return the exit code, sbatch's own too.

    Raises:
        ConfigError: A value or the script cannot be used, or SLURM does not have what is asked for.
    """
    ours, program_flags = _split(arguments)
    config = tyro.cli(SubmitConfig, args=ours, prog="megaft submit")
    path = find_script(config.script)
    directives = config.directives()
    if path.stem == SWEEP and program_flags:
        directives.setdefault("array", f"1-{len(sweep_lines(program_flags[0]))}")
    text = fill_in(read_script(path), directives, program_flags)
    asked = directives_of(text)
    require_time_before_signal(asked)
    require_resources(asked)
    check_program(path.stem, program_flags, asked)
    if config.print:
        print(text, end="")
        return 0
    require(shutil.which("sbatch") is not None, "sbatch is not installed here; use --print, and submit where it is.")
    return subprocess.run(["sbatch"], input=text, text=True, check=False).returncode


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def seconds_of(limit: str) -> int:
    """Return the seconds of a walltime, which SLURM reads as M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    parts = parts if days or len(parts) == 3 else [0, *parts]
    return 86_400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))


def _flag(name: str) -> str:
    return name.replace("_", "-")


def require_time_before_signal(asked: dict[str, str]) -> None:
    """Raise ConfigError if SLURM would signal the end as soon as the job starts: it would be requeued for ever."""
    seconds = asked.get("signal", "").partition("@")[2] or "0"
    time = asked.get("time", "")
    require(
        WALLTIME.fullmatch(time) is None or seconds_of(time) > int(seconds),
        f"--time is {time}, but the script is signalled {seconds} s before that; use more, or change its --signal.",
    )


def require_resources(asked: dict[str, str]) -> None:
    """Raise ConfigError if `sinfo` is here and knows no such partition, or it has less than what is asked for."""
    if shutil.which("sinfo") is None:
        return
    command = ["sinfo", "--noheader", "--format=%P %D %l %G"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print("sinfo does not answer: nodes, GPUs and partition are not checked.", file=sys.stderr)
        return
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    names = [name.rstrip("*") for name, *_ in rows]
    default = next((name.rstrip("*") for name, *_ in rows if name.endswith("*")), names[0] if names else "")
    wanted = asked.get("partition", default)
    require(wanted in names, f"--partition is {wanted}; use one of {', '.join(dict.fromkeys(names))}.")
    here = [(int(nodes), limit, _gpus(gres)) for name, nodes, limit, gres in rows if name.rstrip("*") == wanted]
    _require_at_most("nodes", asked, sum(nodes for nodes, *_ in here), wanted)
    _require_at_most("gpus-per-node", asked, max(gpus for *_, gpus in here), wanted)
    time, limit = asked.get("time", ""), here[0][1]
    require(
        not (WALLTIME.fullmatch(time) and WALLTIME.fullmatch(limit)) or seconds_of(time) <= seconds_of(limit),
        f"--time is {time}; partition {wanted} gives {limit} at most. "
        "Use that or less; the rest is done in more turns.",
    )


def _require_at_most(name: str, asked: dict[str, str], most: int, partition: str) -> None:
    value = asked.get(name, "")
    require(
        not value.isdigit() or int(value) <= most,
        f"{name} is {value}; partition {partition} has {most}. Use {most} or less, or another partition.",
    )


def _gpus(gres: str) -> int:
    return sum(int(number) for number in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
