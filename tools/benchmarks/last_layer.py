"""Measure what last-layer pruning saves in scoring: CPU time of the same windows without it, over that with it.

    python tools/benchmarks/last_layer.py

Random weights in the shapes of GPT-2 124M and SmolLM2-135M, float32, packed where the processor allows it. Both passes
run in turns in one process, and must return the same bits.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from prepare import short
from train_report import cpu_name, table
from transformers import AutoConfig, AutoModelForCausalLM

from megaft.base.environment import environment
from megaft.data.samples import IGNORE_INDEX
from megaft.models.fused import fuse
from megaft.models.products import has_onednn
from megaft.scoring.batch import ScoringBatch
from megaft.scoring.last_layer import AnyTrunk
from megaft.scoring.model import ScoringModel
from megaft.scoring.packed import PackedLinear, pack_linears
from megaft.weights.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
PRESET_NAMES = {"GPT-2 124M": "gpt2", "SmolLM2-135M": "smollm2-135m"}
MODELS: dict[str, Any] = {name: AutoConfig.for_model(**PRESETS[preset]) for name, preset in PRESET_NAMES.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measure what last-layer pruning saves in scoring."""

    models: tuple[str, ...] = tuple(MODELS)
    """Shapes, of those in MODELS."""
    strides: tuple[int, ...] = (32, 256, 512, 1024)
    """Scored tokens of each window."""
    context_length: int = 1024
    """Tokens of each window."""
    batch_size: int = 1
    """Windows of a pass."""
    repeats: int = 5
    """Pairs of passes for each ratio."""
    hardware: str = f"cpu{os.cpu_count()}"
    """Name of the hardware in the result files."""


def main(arguments: Arguments) -> None:
    """Measure every model and stride; write results/last_layer_HARDWARE_YYYYMM.json and .md."""
    torch.set_num_threads(1)
    where, load = environment(), os.getloadavg()
    where["command"] = list(map(short, where["command"]))
    rows = [row for name in arguments.models for row in measure(name, arguments)]
    report = {"environment": where, "processor": cpu_name(), "load": load, "is_packed": is_packed(), "rows": rows}
    stem = RESULTS / f"last_layer_{arguments.hardware}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def measure(name: str, arguments: Arguments) -> list[dict[str, Any]]:
    """Return a row for each stride."""
    pruned, plain = (scoring_model(name, is_pruned=is_pruned) for is_pruned in (True, False))
    shape = (arguments.batch_size, arguments.context_length)
    rows = []
    for stride in arguments.strides:
        input_ids = torch.randint(0, MODELS[name].vocab_size, shape, generator=torch.Generator().manual_seed(stride))
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[:, -stride:] = input_ids[:, -stride:]
        batch = ScoringBatch.of(input_ids.numpy(), labels.numpy(), torch.device("cpu"))
        is_same = torch.equal(pruned(batch), plain(batch))
        passes = [cpu_seconds([pruned, plain], batch, repeat) for repeat in range(arguments.repeats)]
        ratios = sorted(without / with_pruning for with_pruning, without in passes)
        rows.append({"model": name, "stride": stride, "is_same": is_same, "ratios": ratios, "cpu_seconds": passes})
        print(name, stride, is_same, f"{statistics.median(ratios):.3f}", flush=True)
    return rows


def scoring_model(name: str, *, is_pruned: bool) -> ScoringModel:
    """Return a model with the same random weights either way."""
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    fuse(language_model)
    model = ScoringModel(language_model)
    if not is_pruned:
        model.trunk = AnyTrunk(language_model)
    if is_pruned and is_packed():
        model.pack()
    elif is_packed():
        model.head.packed = PackedLinear(model.head.weight, model.head.bias)
        pack_linears(model.trunk)
    return model


def is_packed() -> bool:
    """Return True if evaluation packs float32 weights on this processor."""
    return has_onednn(torch.float32, torch.device("cpu"))


def cpu_seconds(models: list[ScoringModel], batch: ScoringBatch, repeat: int) -> list[float]:
    """Return the CPU time of each model's pass; the first one goes first in every other repeat."""
    order = models if repeat % 2 == 0 else models[::-1]
    times = [time.process_time()]
    for model in order:
        model(batch)
        times.append(time.process_time())
    seconds = [end - begin for begin, end in pairwise(times)]
    return seconds if order is models else seconds[::-1]


def markdown(report: dict[str, Any]) -> str:
    """Return the results as a page."""
    where = report["environment"]
    header = ("model", "stride", "CPU time without / with, median [least, most]", "the same bits")
    lines = (
        (
            row["model"],
            str(row["stride"]),
            f"{statistics.median(row['ratios']):.3f} [{row['ratios'][0]:.3f}, {row['ratios'][-1]:.3f}]",
            "yes" if row["is_same"] else "no",
        )
        for row in report["rows"]
    )
    git = where["git"] or {"commit": "unknown", "is_dirty": False}
    weights = "packed" if report["is_packed"] else "not packed"
    return "\n\n".join(
        (
            "# CPU time that last-layer pruning saves",
            f"Windows scored in float32 on one core, weights {weights}; the two passes by turns in one process. CPU "
            "time of the process, which other programs on the machine change less than wall time.",
            table(header, lines),
            f"- command: `{' '.join(where['command'])}`\n"
            f"- commit: {git['commit']}{' with changes' if git['is_dirty'] else ''}\n"
            f"- hardware: {report['processor']}, {where['num_cores']} cores; load {report['load'][0]:.1f} before\n"
            f"- versions: {', '.join(f'{name} {version}' for name, version in where['packages'].items())}\n",
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
