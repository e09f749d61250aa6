"""Measure the memory and time of `megaft convert` on a large random model: to tensor-parallel shards and back.

    python tools/benchmarks/convert_memory.py --folder /a/local/disk

The disk needs space for two copies of the model. Converting back must reproduce the original bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from prepare import short
from torch import Tensor
from train_report import cpu_name, table
from transformers import LlamaConfig

from megaft.base.environment import environment
from megaft.base.files import sha256_of
from megaft.weights.parameters import Weights, shapes_of
from megaft.weights.writing import write_hugging_face

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "llama-2-7b": {},
    "llama-3-8b": {"vocab_size": 128256, "num_key_value_heads": 8, "intermediate_size": 14336},
    "llama-160m": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 8},
}
"""Differences from the first entry, which is transformers' default of 32 layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measure the memory and time of `megaft convert`."""

    model: str = "llama-2-7b"
    """One of SHAPES, with random weights."""
    tensor_parallel_size: int = 8
    """Tensor-parallel size of the intermediate format."""
    folder: Path | None = None
    """Folder on the disk to test. By default a temporary one."""
    hardware: str = f"cpu{os.cpu_count()}"
    """Name of the hardware in the result files."""


def main(arguments: Arguments) -> None:
    """Convert there and back, and write results/convert_memory_HARDWARE_YYYYMM.json and .md."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cases = measure(arguments, Path(folder))
    where = environment()
    where["command"] = list(map(short, where["command"]))
    report = {"environment": where, "processor": cpu_name(), "load": os.getloadavg(), **cases}
    stem = RESULTS / f"convert_memory_{arguments.hardware}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Return the memory of each conversion, and of the smallest model's as the baseline of Python and its libraries."""
    start, cut, end = (folder / name for name in ("start", "cut", "end"))
    ways = [(start, cut, ["megatron", "--tensor-parallel-size", str(arguments.tensor_parallel_size)])]
    ways += [(cut, end, ["hugging-face"])]
    rows = {}
    for model in ("llama-160m", arguments.model):
        weights = random_weights(LlamaConfig(**SHAPES[model]))
        start.mkdir()
        write_hugging_face(weights, start, torch.bfloat16)
        before = hashes(start)
        for source, to, flags in ways:
            rows[f"{model} to {flags[0]}"] = watched(["--from", str(source), "--to", str(to), "--format", *flags])
            shutil.rmtree(source)
        assert hashes(end) == before, "converting back gave different bytes"
        shutil.rmtree(end)
    largest = max(shape.numel() for shape in weights.shapes.values())
    sizes = {"model_bytes": 2 * weights.num_parameters, "largest_parameter_bytes": 2 * largest}
    return {"model": arguments.model, "tensor_parallel_size": arguments.tensor_parallel_size, **sizes, "rows": rows}


def random_weights(config: LlamaConfig) -> Weights:
    """Return random weights seeded by their names."""
    shapes = shapes_of(config)

    def draw(name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
        return torch.rand(shapes[name], generator=torch.Generator().manual_seed(seed)).bfloat16()

    return Weights(config, torch.bfloat16, shapes, draw)


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each weight file."""
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*.safetensors"))}


def watched(flags: list[str]) -> dict[str, float]:
    """Run `megaft convert`; return its seconds and its peak bytes, resident and anonymous."""
    begin, peak = time.perf_counter(), {"VmHWM": 0, "RssAnon": 0}
    process = subprocess.Popen([sys.executable, "-m", "megaft.cli", "convert", *flags])
    while process.poll() is None:
        for name, num_bytes in memory(process.pid).items():
            peak[name] = max(peak[name], num_bytes)
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"megaft convert {' '.join(flags)} ended with {process.returncode}")
    return {"seconds": time.perf_counter() - begin, "resident": peak["VmHWM"], "own": peak["RssAnon"]}


def memory(pid: int) -> dict[str, int]:
    """Return a process's peak resident memory and current anonymous memory; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon") if name in fields}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    giga, where = 1e9, report["environment"]
    rows = [
        (name, f"{row['own'] / giga:.2f}", f"{row['resident'] / giga:.2f}", f"{row['seconds']:.0f}")
        for name, row in report["rows"].items()
    ]
    speeds = [
        f"{name}: {report['model_bytes'] / giga / row['seconds']:.2f} GB/s"
        for name, row in report["rows"].items()
        if name.startswith(report["model"])
    ]
    return "\n".join(
        [
            "# Memory of `megaft convert`\n",
            f"A random {report['model']} of {report['model_bytes'] / giga:.1f} GB in bfloat16, its largest parameter "
            f"{report['largest_parameter_bytes'] / giga:.2f} GB, from transformers' folder to "
            f"{report['tensor_parallel_size']} tensor-parallel shards and back; the files at the end are those of the "
            "beginning, byte for byte. llama-160m shows what Python and its libraries take. The way back reads its "
            "source twice, since it holds every file against its SHA-256 first.\n",
            table(("conversion", "peak GB, anonymous", "peak GB resident", "s"), rows),
            "",
            f"From disk to disk, hashed and synced: {'; '.join(speeds)}.\n",
            f"- command: `{' '.join(where['command'])}`",
            f"- commit: {where['git'] and where['git']['commit']}",
            f"- hardware: {report['processor']}, {where['num_cores']} cores; "
            f"load {report['load'][0]:.1f}, others' work included",
            f"- versions: {', '.join(f'{name} {version}' for name, version in where['packages'].items())}\n",
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
