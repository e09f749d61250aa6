"""Settings of an evaluation. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.tasks import TASKS
from megaft.base.checks import at_least, require, require_ranges
from megaft.base.topology import own_flags
from megaft.models.backend import Backend


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Score language models zero-shot by named protocols, and write a report.

    `--describe [NAME ...]`, without other flags, explains protocols and tasks.
    Repeat the command to continue an interrupted evaluation.
    Ranks come from `deepspeed --module`, `torchrun -m` or `srun`.
    """

    model: tuple[str, ...]
    """Hub names, folders, GGUF files or run folders; several make one table."""
    task: str = "wikitext103"
    """Task, or several separated by commas; `--describe TASK` explains one."""
    protocol: str = "megaft"
    """Protocol, or several separated by commas; `--describe PROTOCOL` prints its definition."""
    data: Path | None = None
    """Data file of the task, or a folder that contains it. By default $MEGAFT_DATA, else the hub through `datasets`."""
    context_length: int | None = None
    """Tokens per window. By default the protocol's, else all positions of the model."""
    stride: str | None = None
    """Tokens from one window to the next; several separated by commas make a sweep. By default the protocol's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's computation; cross-entropy and sums use float32 or better."""
    output: Path = Path("evaluation")
    """Folder for results.json, report.md, report.html and finished batches."""
    limit: int | None = None
    """Score only the first lines (LAMBADA: rows, CBT: questions), for a quick check; the report marks the result."""
    tokens_per_batch: int | None = None
    """Input tokens per forward pass. By default chosen from model, context length and device type."""
    partition: bool = False
    """Shard the weights over the ranks (ZeRO-3), for models larger than one device."""
    backend: Backend | None = None
    """Model implementation. By default transformers, or megatron-core for folders in megatron's format."""
    tensor_parallel_size: int = 1
    """Ranks that each matrix is sharded over; they score the same windows. Above 1 only with megatron-core."""

    def __post_init__(self) -> None:
        require(len(self.model) > 0, "--model is empty; give a hub name, a folder, a GGUF file or a run's folder.")
        for name in self.tasks:
            require(name in TASKS, f"--task {name!r} is unknown; use one of {', '.join(TASKS)}.")
        for name in self.protocols:
            require(name in PROTOCOLS, f"--protocol {name!r} is unknown; use one of {', '.join(PROTOCOLS)}.")
        for task, protocol in product(self.tasks, self.protocols):
            defining = [name for name in PROTOCOLS if TASKS[task].is_defined_by(PROTOCOLS[name])]
            require(
                protocol in defining, f"--protocol {protocol} does not define task {task}; use {' or '.join(defining)}."
            )
        require(
            self.stride is None or all(part.isdecimal() and int(part) for part in self.stride.split(",")),
            f"--stride is {self.stride!r}; use a number of 1 or more, or several with commas, such as 32,256,1024.",
        )
        require_ranges(self, context_length=at_least(1), limit=at_least(1), tokens_per_batch=at_least(1))
        require_ranges(self, tensor_parallel_size=at_least(1).such_as("8"))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return self.task.split(",")

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols."""
        return self.protocol.split(",")

    @property
    def strides(self) -> list[int] | list[None]:
        """Strides requested; [None]: the protocol's own."""
        return [None] if self.stride is None else [int(part) for part in self.stride.split(",")]


def parse(arguments: list[str] | None = None, is_main: bool = True) -> EvaluateConfig:
    """Parse the command line; exit with code 2 on an error, which the main rank prints."""
    return tyro.cli(EvaluateConfig, args=own_flags(arguments), prog="evaluate_zero_shot", console_outputs=is_main)
