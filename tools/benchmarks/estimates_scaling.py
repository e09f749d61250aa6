"""Estimates of the 8.3 B model of Megatron-LM's paper on 8, 64 and 512 GPUs, for docs/scaling.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from invariance import write_between_marks

from megaft.base.errors import ConfigError
from megaft.base.hardware import GPUS, RESERVED_BYTES
from megaft.commands.estimate.command import speed
from megaft.commands.estimate.recipe import Recipe
from megaft.config.deepspeed_json import read_deepspeed_json
from megaft.config.train import OptimConfig
from megaft.weights.families import dimensions_of
from megaft.weights.presets import PRESETS

ROOT = Path(__file__).parents[2]
GIB = 2**30
CONTEXT = 1024
BATCH = 512
EPOCH = 68_507 * BATCH * CONTEXT
"""Tokens of the paper's epoch: iterations x batch x context (Shoeybi et al. 2019, sections 4.2 and 5.2)."""
PAPER_DAYS, PAPER_GPUS, PAPER_FLOPS = 2.10, 512, 15.1e15
"""Table 2 and abstract."""
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Sharding:
    """A parallel recipe of the model."""

    name: str
    file: str
    tensor_parallel_size: int


SHARDINGS = (Sharding("TP 8 x ZeRO-1", "megatron_8.3b_tp8.json", 8), Sharding("ZeRO-3", "megatron_8.3b_zero3.json", 1))
HARDWARE = ("h100", "a100", "v100-32gb")


def write_scaling(page: Path) -> None:
    """Write the page's tables."""
    content = f"{table()}\n\n{paper()}"
    print(content)
    write_between_marks(page, content)


def table() -> str:
    """Return the largest micro-batch that fits, its memory and time, for each recipe and number of GPUs."""
    head = (
        "| GPU, precision | GPUs | sharding | micro-batch | recomputation | peak per GPU | tokens/s | days per epoch |"
    )
    rows = [row(gpu, count, sharding) for gpu in HARDWARE for count in (8, 64, 512) for sharding in SHARDINGS]
    return "\n".join([head, "|---" * 8 + "|", *rows])


def row(gpu: str, num_gpus: int, sharding: Sharding) -> str:
    """Return one line, without recomputation if that fits."""
    start = f"| {GPUS[gpu].name}, {'bf16' if GPUS[gpu].has_bf16 else 'fp16'} | {num_gpus} | {sharding.name} |"
    largest = best(gpu, num_gpus, sharding)
    if largest is None:
        smallest = recipe(sharding, num_gpus, 1, gpu, is_recomputed=True).footprint().peak_bytes
        return f"{start} none | - | {smallest / GIB:.1f} GiB at least: does not fit | - | - |"
    setup = largest.setup()
    rates = speed(largest, setup.dtype, GPUS[gpu], EPOCH)
    (low, high), (longest, shortest) = rates["tokens_per_second"], rates["days"]
    peak = largest.footprint().peak_bytes / GIB
    recomputed = "yes" if largest.is_recomputed else "no"
    return (
        f"{start} {setup.micro_batch_size} | {recomputed} | {peak:.1f} GiB | {low:,.0f} to {high:,.0f} | "
        f"{shortest:.3g} to {longest:.3g} |"
    )


def best(gpu: str, num_gpus: int, sharding: Sharding) -> Recipe | None:
    """Return the recipe with the largest micro-batch that fits, preferably without recomputation; None if none fits."""
    for is_recomputed in (False, True):
        for size in (64, 32, 16, 8, 4, 2, 1):
            candidate = recipe(sharding, num_gpus, size, gpu, is_recomputed=is_recomputed)
            try:
                if candidate.footprint().peak_bytes <= GPUS[gpu].memory_bytes - RESERVED_BYTES:
                    return candidate
            except ConfigError:  # this micro-batch does not divide the batch over these ranks
                continue
    return None


def recipe(sharding: Sharding, num_gpus: int, micro_batch_size: int, gpu: str, *, is_recomputed: bool) -> Recipe:
    """Return the recipe of a shipped DeepSpeed JSON with another micro-batch; in fp16 if the GPU has no bf16."""
    settings: dict[str, Any] = read_deepspeed_json(ROOT / "ds_configs" / sharding.file)
    settings |= {"train_batch_size": BATCH, "train_micro_batch_size_per_gpu": micro_batch_size}
    if not GPUS[gpu].has_bf16:
        settings = {key: value for key, value in settings.items() if key != "bf16"} | {"fp16": {"enabled": True}}
    return Recipe(
        dims=dimensions_of(PRESETS["megatron-8.3b"]),
        deepspeed=settings,
        context_length=CONTEXT,
        world_size=num_gpus,
        tensor_parallel_size=sharding.tensor_parallel_size,
        is_megatron=sharding.tensor_parallel_size > 1,
        is_recomputed=is_recomputed,
        optim=OptimConfig(),
    )


def paper() -> str:
    """Compare the paper's figures with the estimates."""
    gpu = "v100-32gb"
    recomputed = recipe(SHARDINGS[0], PAPER_GPUS, 8, gpu, is_recomputed=True)
    one = replace(recomputed, world_size=8, deepspeed=recomputed.deepspeed | {"train_batch_size": 8})
    rates = speed(recomputed, "float16", GPUS[gpu], EPOCH)
    work, (longest, shortest) = rates["flops_per_token"], rates["days"]
    tokens_per_second = EPOCH / PAPER_DAYS / SECONDS_PER_DAY
    model_flops = tokens_per_second * work
    lines = [
        "| Megatron-LM's paper | reported | estimated |",
        "|---|---|---|",
        f"| parameters of the 8.3 B model | 8.3 billion | {recomputed.dims.num_parameters:,} |",
        f"| days per epoch on 512 V100 | {PAPER_DAYS:.2f} | {shortest:.2f} to {longest:.2f} |",
        f"| PFLOP/s on 512 V100 | 15.1 (weak-scaling study) | {model_flops / 1e15:.1f} in {PAPER_DAYS:.2f} days "
        f"without recomputation, {model_flops * 4 / 3e15:.1f} with it |",
        f"| fits 8 V100 of 32 GB at batch 8 (weak-scaling study, without ZeRO) | yes | "
        f"{one.footprint().peak_bytes / GIB:.1f} GiB per GPU |",
    ]
    return "\n".join(lines)
