"""Time megaft's training against transformers' Trainer and plain and compiled torch loops, in one invocation.

    python tools/benchmarks/train.py --preset gpt2-124m-cpu [--dtype bf16] [--dropout 0.1] [--repeats 5]

Every system is launched as its users launch it, in turn, repeat after repeat: the same model and weights, text, batch,
precision, optimizer and clipping, without evaluation. The report goes to stdout and, with the raw figures, to
tools/benchmarks/results.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro
from train_case import PRESETS, Case
from train_launch import HERE, Contestant, Run, launch
from train_report import Report


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Time megaft's training against other systems."""

    preset: Literal["toy", "gpt2-124m-cpu", "smollm2-135m-cpu", "gpt2-xl-h100", "llama-3.2-1b-h100"]
    """Model, text and device of the benchmark."""
    contestants: tuple[Contestant, ...] = ("megaft", "trainer", "torch", "compiled")
    """Systems, in the order they run."""
    repeats: int = 5
    """Launches of each."""
    results: Path = HERE / "results"
    """Folder for the report and the raw figures."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Overrides the preset's, like all settings below."""
    dropout: float | None = None
    """All dropout probabilities of the model."""
    micro_batch_size: int | None = None
    """Samples per rank in one forward pass."""
    accumulation: int | None = None
    """Micro-batches per step and rank."""
    warm_up_steps: int | None = None
    """First steps, which are not timed."""
    steps: int | None = None
    """Steps after them."""

    def __post_init__(self) -> None:
        for name, value in (("repeats", self.repeats), ("warm-up-steps", self.warm_up_steps), ("steps", self.steps)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; use 1 or more.")
        self.case().deepspeed_json()  # refuses incompatible batch sizes and precisions

    def case(self) -> Case:
        """Return the preset with the overrides applied."""
        fields = ("dtype", "dropout", "micro_batch_size", "accumulation", "warm_up_steps", "steps")
        said = {name: value for name in fields if (value := getattr(self, name)) is not None}
        return replace(PRESETS[self.preset], **said)


def main(arguments: Arguments) -> int:
    """Launch, report; return 1 if a run failed or the systems started at different losses."""
    import torch

    from megaft.base.environment import environment
    from megaft.base.files import write_json_atomic

    case = arguments.case()
    is_there = "cuda" if torch.cuda.is_available() else "cpu"
    if case.device != is_there:  # the ranks would use the other device
        sys.exit(f"preset {arguments.preset} runs on {case.device}, but this machine offers {is_there}.")
    runs = tuple(measure(case, arguments.contestants, arguments.repeats))
    report = Report(case=case, runs=runs, environment=environment(), flops_per_token=case.flops_per_token())
    print(report.markdown())
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{report.file_name}.md").write_text(report.markdown())
    write_json_atomic(arguments.results / f"{report.file_name}.json", report.as_dict())
    return 0 if report.is_sound else 1


def measure(case: Case, contestants: tuple[Contestant, ...], repeats: int) -> Iterator[Run]:
    """Run the systems in turn; one that fails is not run again."""
    failed = set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        case.make_inputs(folder)
        for repeat in range(repeats):
            for contestant in contestants:
                if contestant in failed:
                    continue
                run = launch(contestant, case, folder, folder / "run")
                shutil.rmtree(folder / "run")  # megaft's last checkpoint has 12 bytes per parameter
                if run.failure:
                    failed.add(contestant)
                print(line(repeat, run), file=sys.stderr, flush=True)
                yield run


def line(repeat: int, run: Run) -> str:
    """Return one line with the outcome of a launch."""
    steps = " ".join(f"{seconds:.3f}" for seconds in run.step_seconds)
    outcome = f"failed: {run.failure}" if run.failure else f"first step after {run.seconds_to_first_step:.1f} s"
    return f"repeat {repeat + 1} {run.contestant}: {outcome}; steps of {steps} s"


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
