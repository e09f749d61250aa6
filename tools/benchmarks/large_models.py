"""Measure the memory of sharded models of Megatron's sizes, on CPU ranks of one machine.

    python tools/benchmarks/large_models.py --folder /a/disk/with/30/GB

Weights are random. The result is the peak of anonymous memory, summed over ranks. Pages of mapped weight files do not
count: the kernel reclaims them when it needs memory.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from large_models_ranks import tokens
from prepare import short
from safetensors.torch import load_file, save_file
from toy import make_texts, make_tokenizer, text
from train_report import cpu_name, table
from transformers import GPT2Config, GPT2LMHeadModel

from megaft.base.environment import environment
from megaft.base.parallel import free_port
from megaft.models.loss import token_nats

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TRAIN = HERE.parents[1] / "megaft" / "train.py"
GB = 1e9
WORDS, POSITIONS = 50_257, 1024
SECONDS_BETWEEN_LOOKS = 0.1
CASE_DESCRIPTIONS = {
    "forward": "54 layers of 1920 (2.5 B), bf16, 2 ranks: loaded from shards as `--partition` does, 256 tokens scored",
    "train": "12 layers of 1920 (0.6 B), fp32, 2 ranks: one step of megaft/train.py from scratch, saved",
    "fake": "72 layers of 3072 (8.3 B), bf16, rank 0 of 64 on a fake process group: training's engine from scratch",
    "cut": "the same with megatron-core at tensor parallelism 8 and ZeRO-1: an eighth of every matrix",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Measure the memory of large sharded models."""

    cases: tuple[str, ...] = tuple(CASE_DESCRIPTIONS)
    """Cases to run: forward, train, fake, cut."""
    folder: Path | None = None
    """Folder with 13 GB of free space. By default a temporary one."""
    hardware: str = f"cpu{os.cpu_count()}"
    """Name of the hardware in the result files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Time and memory of a case, and the output of its ranks."""

    seconds: float
    anonymous_bytes: int
    """Peak of the sum over ranks."""
    rank_bytes: list[int]
    """Peak of each rank."""
    machine_bytes: int
    """Peak drop in the machine's available memory, including other processes."""
    said: dict[str, Any]
    """Output of the main rank; the name is a key of the result files."""


def main(arguments: Arguments) -> None:
    """Run the cases, and write results/large_models_HARDWARE_YYYYMM.json and .md."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        run = {"forward": measure_forward, "train": measure_train, "fake": measure_fake, "cut": measure_cut}
        measured = {case: asdict(run[case](Path(folder) / case)) for case in arguments.cases}
    where = environment()
    where["command"] = list(map(short, where["command"]))
    report = {"environment": where, "processor": cpu_name(), "cases": measured}
    stem = RESULTS / f"large_models_{arguments.hardware}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def configuration(layers: int, width: int, heads: int) -> dict[str, Any]:
    """Return a GPT-2's config.json."""
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": WORDS, "n_positions": POSITIONS}
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **shape}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a random model in bf16, one file per layer, with at most one layer in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shards = [_ends(config), *(_layer(config["n_embd"], number) for number in range(config["n_layer"]))]
    files = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: _random(shape, generator) for name, shape in shapes.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(shapes, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _ends(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    width = config["n_embd"]
    ends = {"wte.weight": (WORDS, width), "wpe.weight": (POSITIONS, width)}
    return {f"transformer.{name}": shape for name, shape in (ends | _norm("ln_f", width)).items()}


def _layer(width: int, number: int) -> dict[str, tuple[int, ...]]:
    shapes = _norm("ln_1", width) | _norm("ln_2", width)
    for name, inner, outer in (("attn.c_attn", 1, 3), ("attn.c_proj", 1, 1), ("mlp.c_fc", 1, 4), ("mlp.c_proj", 4, 1)):
        shapes |= {f"{name}.weight": (inner * width, outer * width), f"{name}.bias": (outer * width,)}
    return {f"transformer.h.{number}.{name}": shape for name, shape in shapes.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=generator) * 0.02
    return (values if len(shape) > 1 else 1 + values).bfloat16()


def measure_forward(folder: Path) -> Measured:
    """Load the 2.5 B shape sharded and score a text with it."""
    write_model(folder / "model", configuration(54, 1920, 20))
    output = folder / "output.json"
    command = [str(HERE / "large_models_ranks.py"), "forward", str(folder / "model"), str(output)]
    measured = measure_memory(2, command, output)
    measured.said["nats_per_token_layer_by_layer"] = nats_layer_by_layer(folder / "model")
    shutil.rmtree(folder)
    return measured


@torch.no_grad()
def nats_layer_by_layer(folder: Path) -> float:
    """Return the expected nats: score the same tokens with transformers' layers, one in memory at a time."""
    config = GPT2Config.from_pretrained(folder, n_layer=1)
    model: Any = GPT2LMHeadModel(config).bfloat16().eval().transformer
    ends, *layers = sorted(folder.glob("*.safetensors"))
    model.load_state_dict(
        {name.removeprefix("transformer."): values for name, values in load_file(ends).items()}, strict=False
    )
    input_ids, labels = tokens(WORDS)
    hidden = model.wte(input_ids) + model.wpe(torch.arange(input_ids.shape[1]))
    for layer in layers:
        model.h[0].load_state_dict({name.split(".", 3)[3]: values for name, values in load_file(layer).items()})
        hidden = model.h[0](hidden)
    return float(token_nats(torch.nn.functional.linear(model.ln_f(hidden), model.wte.weight), labels).mean())


def measure_train(folder: Path) -> Measured:
    """Train 12 layers of the same width for a step, and save."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(configuration(12, 1920, 20)))
    make_tokenizer(folder / "model", text())
    train, _ = make_texts(folder)
    settings = {"stage": 3, "reduce_bucket_size": 10**7, "stage3_prefetch_bucket_size": 10**7}
    settings |= {"stage3_max_live_parameters": 10**8, "stage3_max_reuse_distance": 10**8}
    batch = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}
    (folder / "deepspeed.json").write_text(json.dumps(batch | {"zero_optimization": settings}))
    flags = [f"--deepspeed_config={folder / 'deepspeed.json'}", f"--model.from-scratch={folder / 'model'}"]
    flags += [f"--data.tokenizer={folder / 'model'}", f"--data.train={train}", "--data.context-length=128"]
    flags += ["--run.max-steps=1", "--run.export=none", f"--run.dir={folder / 'run'}", "--run.seed=1"]
    measured = measure_memory(2, [str(TRAIN), *flags], None)
    files = list((folder / "run" / "checkpoints").rglob("*.safetensors"))
    row = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    measured.said.update(loss=row["loss"], checkpoint_bytes=sum(file.stat().st_size for file in files))
    shutil.rmtree(folder)
    return measured


def measure_fake(folder: Path, case: str = "fake") -> Measured:
    """Build training's engine of the 8.3 B shape as one of 64 ranks."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configuration(72, 3072, 24)))
    output = folder / "output.json"
    return measure_memory(1, [str(HERE / "large_models_ranks.py"), case, str(folder), str(output)], output)


def measure_cut(folder: Path) -> Measured:
    """Build it in megatron-core, as one of eight tensor-parallel ranks."""
    return measure_fake(folder, "cut")


def measure_memory(num_ranks: int, arguments: list[str], output: Path | None) -> Measured:
    """Start ranks and sample their memory until they end; return it with the figures of the main rank."""
    began, available = time.perf_counter(), _available()
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    ranks = [
        subprocess.Popen([sys.executable, *arguments], env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_ranks)
    ]
    peak, peaks, machine = 0, [0] * num_ranks, 0
    while any(rank.poll() is None for rank in ranks):
        now = [_anonymous(rank.pid) for rank in ranks]
        peak, peaks = max(peak, sum(now)), list(map(max, peaks, now))
        machine = max(machine, available - _available())
        if any(rank.returncode for rank in ranks):  # the others would wait for the failed rank
            for rank in ranks:
                rank.terminate()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    codes = [rank.returncode for rank in ranks]
    assert not any(codes), f"ranks ended with {codes}"
    return Measured(
        seconds=time.perf_counter() - began,
        anonymous_bytes=peak,
        rank_bytes=peaks,
        machine_bytes=machine,
        said={} if output is None else json.loads(output.read_text()),
    )


def _anonymous(pid: int) -> int:
    """Return the anonymous memory of a process in bytes; 0 after it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def _available() -> int:
    return 1024 * int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0])


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    where = report["environment"]
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "GB of anonymous memory, all ranks": lambda case: f"{case['anonymous_bytes'] / GB:.2f}",
        "of each": lambda case: ", ".join(f"{peak / GB:.2f}" for peak in case["rank_bytes"]),
        "GB less on the machine": lambda case: f"{case['machine_bytes'] / GB:.2f}",
        "seconds": lambda case: f"{case['seconds']:.0f}",
    }
    rows = ((name, *(show(case) for show in columns.values())) for name, case in report["cases"].items())
    outputs = [f"- {name}: `{json.dumps(case['said'])}`" for name, case in report["cases"].items()]
    return "\n".join(
        [
            "# Memory of large sharded models\n",
            "Peaks of memory while a case runs, from starting Python to its end. Anonymous memory is what the ranks "
            "hold themselves; the machine's column also has mapped files that were read. That and the seconds are with "
            "whatever else ran there.\n",
            *(f"- {name}: {CASE_DESCRIPTIONS[name]}" for name in report["cases"]),
            "",
            table(("case", *columns), rows),
            "\nOutput of the main rank:\n",
            *outputs,
            f"\n- command: `python tools/benchmarks/large_models.py {' '.join(where['command'][1:])}`",
            f"- commit: {where['git'] and where['git']['commit']}",
            f"- hardware: {report['processor']}, {where['num_cores']} cores",
            f"- versions: {', '.join(f'{name} {number}' for name, number in where['packages'].items())}\n",
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
