"""`megaft validate`: dry run of a training start on a CPU, for any number of ranks.

It runs training's own code: it prepares the data, loads the model, builds the DeepSpeed engine as rank 0 of N on a CPU,
and loads the newest checkpoint. torch's fake process group stands in for the other ranks.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megaft.base.checks import at_least, require, require_ranges
from megaft.base.errors import CheckpointError, UserError
from megaft.config.optimizers import OPTIMIZERS
from megaft.config.train import TrainConfig, bytes_per_parameter

if TYPE_CHECKING:
    from megaft.checkpoint.run_state import RunState
    from megaft.config.deepspeed_json import ResolvedSettings
    from megaft.run.build import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateConfig(TrainConfig):
    """Check a training run without a GPU and print its plan. Takes the flags of training.

    Nothing is written to the run's folder. The exit code is 0, or the one with which training would fail at start-up.
    """

    world_size: int = 1
    """Number of ranks of the run."""
    json: bool = False
    """Print one line of JSON instead of a table."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        require_ranges(self, world_size=at_least(1))


def main(config: ValidateConfig) -> int:
    """Check the run, print its plan, and return 0.

    Raises:
        UserError: Training would refuse the settings.
    """
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # before torch is imported
    with redirect_stdout(sys.stderr):
        plan = validate(config)
    show(plan, config.json)
    return 0


def validate(config: ValidateConfig) -> dict[str, Any]:
    """Return the plan of the run, as JSON values.

    Raises:
        UserError: Training would refuse the settings.
    """
    from megaft.base import parallel
    from megaft.run.build import build
    from megaft.run.plan import plan_run
    from megaft.run.settings import plan_settings, resumed_batch_size
    from megaft.run.start import resume
    from megaft.weights import manifest

    setup, resumed = plan_settings(config, config.world_size, has_cuda=True), resumed_batch_size(config)
    try:
        with _temporary_run_folder(config) as folder:
            cpu_config, notes = _cpu_settings(config, setup, folder)
            for note in notes:
                print(note)
            topology = parallel.join_fake_group(config.world_size)
            run = build(plan_run(cpu_config, topology, has_cuda=False), topology)
            # Checkpoints are compared with the run itself, not with what replaces it here.
            identity = replace(run.identity, precision=setup.dtype, optim=asdict(setup.optim))
            state = resume(replace(run, identity=identity))
            checked_plan = _answer(config, setup, run, state)
    finally:
        parallel.leave()
    checked_plan["resumes_from"] = str(manifest.folder_of(config.run.dir, state.step)) if resumed else None
    checked_plan["notes"] = [*setup.notes, *notes]
    require_room(config, checked_plan["checkpoint_bytes"])
    return checked_plan


CPU_JSON = "deepspeed.json"
"""File name of the DeepSpeed JSON for the check on the CPU."""


@contextmanager
def _temporary_run_folder(config: ValidateConfig) -> Iterator[Path]:
    """Yield a temporary folder with links to the run's data and checkpoints; messages name the real files."""
    with tempfile.TemporaryDirectory(prefix="megaft-validate-") as temporary:
        folder = Path(temporary)
        _link(config.run.dir, folder, config.run.fresh)
        names = {str(folder / CPU_JSON): str(config.deepspeed_config), str(folder): str(config.run.dir)}
        streams = RenamingStream(sys.stdout, names), RenamingStream(sys.stderr, names)
        try:
            with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
                yield folder
        except UserError as error:
            raise type(error)(_renamed(str(error), names)) from error


def _link(run_dir: Path, folder: Path, is_fresh: bool) -> None:
    """Link or copy the files of the run's folder that training would read into a temporary folder."""
    from megaft.base.files import naming_disk_errors

    if not is_fresh and (run_dir / "checkpoints").is_dir():
        (folder / "checkpoints").symlink_to((run_dir / "checkpoints").resolve())
    (folder / "data").mkdir()
    for file in (run_dir / "data").glob("*"):
        if file.suffix in (".bin", ".idx", ".json"):  # only complete files, which are replaced, never changed
            (folder / "data" / file.name).symlink_to(file.resolve())
    if (events := run_dir / "events.jsonl").exists():
        with naming_disk_errors(events):
            shutil.copyfile(events, folder / "events.jsonl")  # a copy, since events are appended


class RenamingStream(io.TextIOBase):
    """Text stream that writes to another stream, with names replaced."""

    def __init__(self, stream: TextIO, names: Mapping[str, str]) -> None:
        self._stream, self._names = stream, names

    def write(self, text: str) -> int:
        """Write a text with the names replaced."""
        return self._stream.write(_renamed(text, self._names))

    def flush(self) -> None:
        """Flush the other stream."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Return True if the other stream is a terminal."""
        return self._stream.isatty()


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def _cpu_settings(config: ValidateConfig, setup: ResolvedSettings, folder: Path) -> tuple[ValidateConfig, list[str]]:
    """Return settings that a CPU can build instead of those that need a GPU, and notes on the replacements."""
    from megaft.base.files import write_json_atomic

    notes, json = [], {**setup.as_read}
    optim, model = config.optim, replace(config.model, compile="off")
    if setup.dtype == "float16":
        del json["fp16"]
        notes.append("float16 was replaced by float32 for this check.")
    if (other := OPTIMIZERS[setup.optim.name].cpu_equivalent) is not None:
        json.pop("optimizer", None)
        optim = replace(setup.optim, name=other)
        notes.append(
            f"{setup.optim.name} was replaced by {other} for this check; run `megaft doctor` on a GPU node to test it."
        )
    if config.model.compile == "on":
        notes.append("compilation was left out of this check.")
    write_json_atomic(folder / CPU_JSON, json)
    changed = {"deepspeed_config": folder / CPU_JSON, "optim": optim, "model": model}
    return replace(config, **changed, run=replace(config.run, dir=folder)), notes


def _answer(config: ValidateConfig, setup: ResolvedSettings, run: Run, state: RunState) -> dict[str, Any]:
    from megaft.config.parallelism import num_data_ranks
    from megaft.models import parameters as parameters_module

    parameters = list(run.engine.module.parameters())
    num_trained = parameters_module.count(parameter for parameter in parameters if parameter.requires_grad)
    return {
        "world_size": config.world_size,
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "data_parallel_size": num_data_ranks(config.world_size, config.parallel.tensor_parallel_size),
        "global_batch_size": setup.global_batch_size,
        "micro_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.gradient_accumulation_steps,
        "zero_stage": setup.zero_stage,
        "dtype": setup.dtype,
        "optimizer": setup.optim.name,
        "max_steps": run.plan.max_steps,
        "done_steps": state.step,
        "tokens": run.plan.max_steps * setup.global_batch_size * config.data.context_length,
        "parameters": parameters_module.count(parameters),
        "trained_parameters": num_trained,
        "checkpoint_bytes": num_trained * bytes_per_parameter(setup.optim),
    }


def require_room(config: ValidateConfig, checkpoint_bytes: int) -> None:
    """Check that the disk has room for the retained checkpoints, the best one, and one being written.

    Raises:
        ConfigError: The run's folder cannot be written.
        CheckpointError: There is not enough free space.
    """
    run_dir = config.run.dir
    existing = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    require(
        existing.is_dir() and os.access(existing, os.W_OK),
        f"--run.dir is {run_dir}, but {existing} is not a folder that can be written; use another folder.",
    )
    count = config.checkpoint.keep_last + 2
    used = sum(file.stat().st_size for file in (run_dir / "checkpoints").rglob("*") if file.is_file())
    needed, free = count * checkpoint_bytes - used, shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"--run.dir is {run_dir}, which needs {needed:,} bytes more for {count} checkpoints of "
            f"{checkpoint_bytes:,} bytes (--checkpoint.keep-last and two more), but {free:,} are available; delete "
            "files there, keep fewer checkpoints, or use another --run.dir."
        )


def show(plan: dict[str, Any], as_json: bool) -> None:
    """Print the plan of the run."""
    from megaft.base.files import to_json

    if as_json:
        print(to_json(plan))
        return
    for name, value in _lines(plan).items():
        print(f"{name:<14} {value}")


def _lines(plan: dict[str, Any]) -> dict[str, str]:
    batch = "{global_batch_size} = micro-batch {micro_batch_size} x accumulation {gradient_accumulation_steps}"
    size = plan["tensor_parallel_size"]
    done = f", {plan['done_steps']:,} of them done" if plan["resumes_from"] else ""
    return {
        "global batch": f"{batch} x data-parallel ranks {{data_parallel_size}}".format(**plan),
        "ranks": str(plan["world_size"]) + (f", in tensor-parallel groups of {size}" if size > 1 else ""),
        "engine": "ZeRO {zero_stage}, {dtype}, {optimizer}".format(**plan),
        "steps": f"{plan['max_steps']:,}{done}",
        "tokens": f"{plan['tokens']:,} at most",
        "parameters": "{parameters:,}, of which {trained_parameters:,} are trained".format(**plan),
        "checkpoint": "{checkpoint_bytes:,} bytes".format(**plan),
        "resumes from": str(plan["resumes_from"] or "nothing: a new run"),
    }
