"""Check a batch job before it is queued: everything that its program would refuse at its start."""

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
from megaft.config.deepspeed_json import read_deepspeed_json, resolve
from megaft.config.parallelism import num_data_ranks
from megaft.config.prepare import PrepareConfig
from megaft.config.train import TrainConfig, parse_train

TRAINING = ("finetune_1node", "finetune_multinode", "finetune_megatron_8.3b_tp8", "finetune_megatron_8.3b_zero3")
SWEEP = "finetune_sweep"
_TASKS = r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?"
ARRAY = re.compile(rf"{_TASKS}(?:,{_TASKS})*(?:%[1-9]\d*)?")


def check_program(recipe: str, flags: list[str], asked: dict[str, str]) -> None:
    """Check the flags of a recipe's program; another script's program is not known.

    Files are looked for where `sbatch` is. Elsewhere the script is to be carried to its cluster, and only a DeepSpeed
    JSON that is here as well is looked into.

    Args:
        recipe: Its name.
        flags: What its program takes.
        asked: The job's #SBATCH options.

    Raises:
        UserError: The program would refuse the flags, not find a file, or not cut its batch over the job's ranks.
        SystemExit: With 2, from the parser of the flags.
    """
    if recipe in TRAINING:
        _check_training(parse_train([*recipe_flags(recipe), *flags]), asked)
    elif recipe == SWEEP:
        _check_sweep(flags, asked)
    elif recipe == "prepare_data":
        config = tyro.cli(PrepareConfig, args=flags, prog="megaft prepare")
        if shutil.which("sbatch"):
            from megaft.data.input_files import expand

            expand(config.inputs)


def recipe_flags(recipe: str) -> list[str]:
    """Return a training recipe's own flags, which stand before the user's in its last line."""
    *_, last = read_text(find_script(recipe)).splitlines()
    return shlex.split(last.replace("$MEGAFT_HOME", str(ROOT)))[1:-1]


def sweep_lines(path: str) -> list[str]:
    """Return the lines of a file of flags, without blank ones at its end.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, has Windows line ends, or is blank.
    """
    lines = read_text(Path(path)).rstrip().split("\n")
    require(lines != [""], f"{path} is blank; write a line of flags for each run of the sweep.")
    return lines


def _check_sweep(flags: list[str], asked: dict[str, str]) -> None:
    require(bool(flags), f"{SWEEP} takes a file of flags, one line a task, and then the flags of all: -- sweep.txt ...")
    path, *of_all = flags
    lines = sweep_lines(path)
    for task in tasks_of(asked["array"], len(lines)):
        where = f"line {task} of {path}"
        try:
            words = shlex.split(lines[task - 1])
            require(bool(words), "it has no flags.")
            _check_training(parse_train([*of_all, *words]), asked)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; close the quote.") from error
        except UserError as error:
            raise type(error)(f"{where}: {error}") from error
        except SystemExit:
            print(f"error: {where} has these flags.", file=sys.stderr)
            raise


def tasks_of(array: str, count: int) -> Iterator[int]:
    """Yield the numbers of an array's tasks, such as 1-6%2.

    Raises:
        ConfigError: A range is empty, or a number is not one of 1 to `count`.
    """
    for first, last, every in re.findall(_TASKS, array.partition("%")[0]):
        begin, end = int(first), int(last or first)
        require(1 <= begin <= end <= count, f"--array is {array}, but the file of flags has lines 1 to {count}.")
        yield from range(begin, end + 1, int(every or 1))


def _check_training(config: TrainConfig, asked: dict[str, str]) -> None:
    is_cluster = shutil.which("sbatch") is not None
    if is_cluster or config.deepspeed_config.is_file():
        _check_batch(config, asked)
    if is_cluster:
        from megaft.run.sources import named_sources
        from megaft.weights.loading.pretrained import require_there

        named_sources(config.data)
        if config.model.path is not None:
            require_there(config.model.path)


def _check_batch(config: TrainConfig, asked: dict[str, str]) -> None:
    """Read the DeepSpeed JSON as the job's ranks will. A run that goes on cuts its batch to fit them."""
    nodes, per_node = asked.get("nodes", ""), asked.get("ntasks-per-node", "")
    raw = read_deepspeed_json(config.deepspeed_config)
    if not (nodes.isdecimal() and per_node.isdecimal()):
        return
    goes_on = not config.run.fresh and (config.run.dir / "checkpoints").is_dir()
    train = raw.get("train_batch_size")
    resolve(
        raw,
        world_size=num_data_ranks(int(nodes) * int(per_node), config.parallel.tensor_parallel_size),
        optim=config.optim,
        has_cuda=asked.get("gpus-per-node", "0") != "0",
        resumed_batch_size=train if goes_on and isinstance(train, int) else None,
    )
