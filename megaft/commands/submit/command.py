"""`megaft submit`: fill in a batch script of slurm/ and submit it to SLURM, or print it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import tyro

from megaft.base.checks import require
from megaft.commands.submit.batch_script import directives_of, fill_in, find_script, read_script
from megaft.commands.submit.config import SubmitConfig
from megaft.commands.submit.job_check import SWEEP, check_program, sweep_lines
from megaft.commands.submit.walltime import WALLTIME, seconds_of


def main(arguments: list[str]) -> int:
    """Run the command on its flags, `--` and the program's flags; return the exit code, which may be sbatch's.

    Raises:
        ConfigError: A value or the script is invalid, or SLURM does not have the requested resources.
    """
    own_flags, program_flags = _split(arguments)
    config = tyro.cli(SubmitConfig, args=own_flags, prog="megaft submit")
    path = find_script(config.script)
    directives = config.directives()
    if path.stem == SWEEP and program_flags:
        directives.setdefault("array", f"1-{len(sweep_lines(program_flags[0]))}")
    text = fill_in(read_script(path), directives, program_flags)
    requested = directives_of(text)
    require_time_before_signal(requested)
    require_resources(requested)
    check_program(path.stem, program_flags, requested)
    if config.print:
        print(text, end="")
        return 0
    require(
        shutil.which("sbatch") is not None,
        "sbatch is not installed here; use --print, and submit the script on a login node.",
    )
    return subprocess.run(["sbatch"], input=text, text=True, check=False).returncode


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def require_time_before_signal(requested: dict[str, str]) -> None:
    """Raise ConfigError if SLURM would signal the job as soon as it starts: it would be requeued forever."""
    seconds = requested.get("signal", "").partition("@")[2] or "0"
    time = requested.get("time", "")
    require(
        WALLTIME.fullmatch(time) is None or seconds_of(time) > int(seconds),
        f"--time is {time}, but the script asks SLURM for a signal {seconds} s before the limit; use a longer --time, "
        "or a smaller --signal in the script.",
    )


def require_resources(requested: dict[str, str]) -> None:
    """Raise ConfigError if the partition is unknown to `sinfo` or too small; without `sinfo` nothing is checked."""
    if shutil.which("sinfo") is None:
        return
    command = ["sinfo", "--noheader", "--format=%P %D %l %G"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print("warning: sinfo failed; nodes, GPUs and partition are not checked.", file=sys.stderr)
        return
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines()]
    names = [name.rstrip("*") for name, *_ in rows]
    default = next((name.rstrip("*") for name, *_ in rows if name.endswith("*")), names[0] if names else "")
    wanted = requested.get("partition", default)
    require(wanted in names, f"--partition is {wanted}; use one of {', '.join(dict.fromkeys(names))}.")
    here = [(int(nodes), limit, _gpus(gres)) for name, nodes, limit, gres in rows if name.rstrip("*") == wanted]
    _require_at_most("nodes", requested, sum(nodes for nodes, *_ in here), wanted)
    _require_at_most("gpus-per-node", requested, max(gpus for *_, gpus in here), wanted)
    time, limit = requested.get("time", ""), here[0][1]
    require(
        not (WALLTIME.fullmatch(time) and WALLTIME.fullmatch(limit)) or seconds_of(time) <= seconds_of(limit),
        f"--time is {time}, but partition {wanted} allows {limit}; use {limit} or less. A requeued job "
        "continues its run.",
    )


def _require_at_most(name: str, requested: dict[str, str], most: int, partition: str) -> None:
    value = requested.get(name, "")
    require(
        not value.isdigit() or int(value) <= most,
        f"--{name} is {value}, but partition {partition} has {most}; use {most} or less, or another --partition.",
    )


def _gpus(gres: str) -> int:
    return sum(int(number) for number in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres))
