"""Checks of a batch job before it is queued: everything that its program would refuse at start-up."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro

from megaft.base.checks import require
from megaft.base.errors import ConfigError, UserError
from megaft.commands.submit.batch_script import ROOT, find_script, read_text
from megaft.config.deepspeed_json import read_deepspeed_json
from megaft.config.prepare import PrepareConfig
from megaft.config.train import TrainConfig, parse_train
from megaft.run.settings import plan_settings

TRAINING = ("finetune_1node", "finetune_multinode", "finetune_megatron_8.3b_tp8", "finetune_megatron_8.3b_zero3")
SWEEP = "finetune_sweep"
_TASKS = r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?"
ARRAY = re.compile(rf"{_TASKS}(?:,{_TASKS})*(?:%[1-9]\d*)?")


def check_program(recipe: str, flags: list[str], requested: dict[str, str]) -> None:
    """Check the flags of a recipe's program; programs of other scripts are unknown and not checked.

    Files are checked if `sbatch` is installed. Otherwise the script is meant for another machine, and only a DeepSpeed
    JSON that exists here is checked.

    Args:
        recipe: Name of the recipe.
        flags: Flags of its program.
        requested: The job's #SBATCH options.

    Raises:
        UserError: The program would refuse the flags, miss a file, or fail to split its batch over the job's ranks.
        SystemExit: Exit code 2 from the flag parser.
    """
    if recipe in TRAINING:
        _check_training(parse_train([*recipe_flags(recipe), *flags]), requested)
    elif recipe == SWEEP:
        _check_sweep(flags, requested)
    elif recipe == "prepare_data":
        config = tyro.cli(PrepareConfig, args=flags, prog="megaft prepare")
        if shutil.which("sbatch"):
            from megaft.data.input_files import expand

            expand(config.inputs)


def recipe_flags(recipe: str) -> list[str]:
    """Return a training recipe's own flags, which precede the user's in its last line."""
    *_, last = read_text(find_script(recipe)).splitlines()
    return shlex.split(last.replace("$MEGAFT_HOME", str(ROOT)))[1:-1]


def sweep_lines(path: str) -> list[str]:
    """Return the lines of a sweep file (flags, one run per line), without trailing blank lines.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, has Windows line endings, or is blank.
    """
    lines = read_text(Path(path)).rstrip().split("\n")
    require(lines != [""], f"{path} is blank; write a line of flags for each run of the sweep.")
    return lines


def _check_sweep(flags: list[str], requested: dict[str, str]) -> None:
    require(
        bool(flags), f"{SWEEP} takes a file with one line of flags per task, then flags for all tasks: -- sweep.txt ..."
    )
    path, *common = flags
    lines = sweep_lines(path)
    for task in tasks_of(requested["array"], len(lines)):
        where = f"line {task} of {path}"
        try:
            words = shlex.split(lines[task - 1])
            require(bool(words), "the line is blank; write the flags of a run.")
            _check_training(parse_train([*common, *words]), requested)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; close the quote.") from error
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error
        except SystemExit:
            print(f"error: the flags above are in {where}.", file=sys.stderr)
            raise


def tasks_of(array: str, count: int) -> Iterator[int]:
    """Yield the numbers of an array's tasks, such as 1-6%2.

    Raises:
        ConfigError: A range is empty, or a number is not one of 1 to `count`.
    """
    for first, last, every in re.findall(_TASKS, array.partition("%")[0]):
        begin, end = int(first), int(last or first)
        require(
            1 <= begin <= end <= count,
            f"--array is {array}, but the file of flags has lines 1 to {count}; use task numbers from 1 to {count}, "
            "and ranges that ascend.",
        )
        yield from range(begin, end + 1, int(every or 1))


def _check_training(config: TrainConfig, requested: dict[str, str]) -> None:
    is_cluster = shutil.which("sbatch") is not None
    if is_cluster or config.deepspeed_config.is_file():
        _check_batch(config, requested)
    if is_cluster:
        from megaft.run.plan import require_inputs

        require_inputs(config)


def _check_batch(config: TrainConfig, requested: dict[str, str]) -> None:
    """Check the batch sizes for the job's ranks; if their number is unknown, check only the DeepSpeed JSON."""
    nodes, per_node = requested.get("nodes", ""), requested.get("ntasks-per-node", "")
    if not (nodes.isdecimal() and per_node.isdecimal()):
        read_deepspeed_json(config.deepspeed_config)
        return
    plan_settings(config, int(nodes) * int(per_node), has_cuda=requested.get("gpus-per-node", "0") != "0")
