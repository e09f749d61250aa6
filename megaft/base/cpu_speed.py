"""Speed of half precision on a CPU: without AVX-512 BF16 or AMX it is many times slower than fp32."""

from __future__ import annotations

import time

import torch

WIDTH = 256
REPETITIONS = 3
SLOW = 2.0
"""Times fp32's seconds from which on a dtype is called slow; with instructions for it bf16 takes half of them."""


def seconds_of_products(dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """Return the seconds that one product of square matrices takes in each dtype: the least of a few."""
    return {dtype: min(_seconds(dtype) for _ in range(1 + REPETITIONS)) for dtype in dtypes}


def _seconds(dtype: torch.dtype) -> float:
    matrix = torch.ones(WIDTH, WIDTH, dtype=dtype)
    begin = time.perf_counter()
    torch.mm(matrix, matrix)
    return time.perf_counter() - begin


def slowdown(seconds: dict[torch.dtype, float], dtype: torch.dtype) -> float | None:
    """Return the time of a slow dtype relative to fp32; None if the dtype is not slow."""
    ratio = seconds[dtype] / max(seconds[torch.float32], 1e-9)
    return ratio if ratio >= SLOW else None


def notes_on_precision(
    seconds: dict[torch.dtype, float], dtype: torch.dtype, zero_stage: int, offload_optimizer: bool
) -> list[str]:
    """Return a sentence where a run in `dtype` is slow on this CPU, with the recipe that computes the same in fp32."""
    ratio = slowdown(seconds, dtype)
    if ratio is None:
        return []
    offload = "_offload" if offload_optimizer and zero_stage == 2 else ""  # of the recipes in fp32 only this one
    return [
        f"warning: on this CPU {name(dtype)} is {ratio:.0f} times slower than fp32 (matrix products of {WIDTH}); "
        f"ds_configs/zero{zero_stage}_fp32{offload}.json is faster."
    ]


def name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in DeepSpeed's JSON."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
