"""One launch of one system of the training benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import launchers
from train_case import BETAS, EPSILON, LEARNING_RATE, SEED, WEIGHT_DECAY, Case

Contestant = Literal["megaft", "trainer", "torch", "compiled"]
HERE = Path(__file__).parent
MEGAFT = HERE.parents[1] / "megaft" / "train.py"
SECONDS_BETWEEN_LOOKS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Result of a launch."""

    contestant: Contestant
    seconds_to_first_step: float
    """From the start of the launcher until the first step's row is in the file."""
    step_seconds: tuple[float, ...]
    losses: tuple[float, ...]
    """Nats per token of the global batch at each step."""
    peak_memory_bytes: int
    """Of the main rank."""
    peak_flops: float | None
    """Peak FLOPs of one device, as reported by megaft."""
    failure: str | None
    """Last line about an error, if the launch failed."""


def command(contestant: Contestant, case: Case, folder: Path, run_dir: Path) -> list[str]:
    """Return the launch: the deepspeed launcher, and torchrun for the plain loop."""
    deepspeed, torchrun = launchers.deepspeed(case.num_ranks), launchers.torchrun(case.num_ranks)
    return {
        "megaft": [*deepspeed, str(MEGAFT), *_megaft_flags(case, folder, run_dir)],
        "trainer": [*deepspeed, str(HERE / "train_peer_trainer.py"), str(folder), str(run_dir)],
        "torch": [*torchrun, str(HERE / "train_peer_torch.py"), str(folder), str(run_dir)],
        "compiled": [*torchrun, str(HERE / "train_peer_torch.py"), str(folder), str(run_dir), "compiled"],
    }[contestant]


def _megaft_flags(case: Case, folder: Path, run_dir: Path) -> list[str]:
    return [
        f"--deepspeed_config={folder / 'deepspeed.json'}",
        f"--model.from-scratch={folder / 'model'}",
        f"--data.train={folder / 'train'}",
        f"--data.tokenizer={folder / 'tokenizer'}",
        f"--data.context-length={case.context_length}",
        f"--run.dir={run_dir}",
        f"--run.max-steps={case.max_steps}",
        f"--run.seed={SEED}",
        "--run.export=none",
        f"--optim.learning-rate={LEARNING_RATE}",
        "--optim.schedule=constant",
        f"--optim.weight-decay={WEIGHT_DECAY}",
        f"--optim.beta1={BETAS[0]}",
        f"--optim.beta2={BETAS[1]}",
        f"--optim.epsilon={EPSILON}",
    ]


def launch(contestant: Contestant, case: Case, folder: Path, run_dir: Path) -> Run:
    """Run a system and read its output."""
    run_dir.mkdir()
    metrics, log = run_dir / "metrics.jsonl", run_dir / "log.txt"
    with log.open("w") as output:
        seconds, code = _watch(command(contestant, case, folder, run_dir), _environment(case), metrics, output)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    config = run_dir / "config.json"
    return Run(
        contestant=contestant,
        seconds_to_first_step=seconds,
        step_seconds=tuple(row["seconds"] for row in rows),
        losses=tuple(row["loss"] for row in rows),
        peak_memory_bytes=rows[-1]["peak_memory_bytes"] if rows else 0,
        peak_flops=json.loads(config.read_text())["settings"]["peak_flops"] if config.exists() else None,
        failure=last_error(log) if code or len(rows) < case.max_steps else None,
    )


def _environment(case: Case) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // case.num_ranks)
    only_cpu = {"DS_ACCELERATOR": "cpu"} if case.device == "cpu" else {}
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | only_cpu


def _watch(arguments: list[str], environment: dict[str, str], metrics: Path, output) -> tuple[float, int]:
    """Return the seconds until the file has a row (or the process ends), and the exit code."""
    begin, first = time.perf_counter(), None
    with subprocess.Popen(arguments, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            while True:
                is_over = process.poll() is not None
                if first is None and (is_over or (metrics.exists() and metrics.stat().st_size)):
                    first = time.perf_counter() - begin
                if is_over and first is not None:
                    return first, process.returncode
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            process.terminate()


def last_error(log: Path) -> str:
    """Return the last line of a log that names an error, or else the last line."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
    return next((line for line in reversed(lines) if "Error" in line and "ChildFailed" not in line), lines[-1]).strip()
