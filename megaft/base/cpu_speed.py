"""Measure half-precision speed on a CPU, which without AVX-512 BF16 or AMX is far slower than fp32."""

from __future__ import annotations

import time

import torch

WIDTH = 256
REPETITIONS = 3
SLOW = 2.0
"""Time relative to fp32 from which a dtype is reported as slow; with hardware support bf16 takes half the time."""


def seconds_of_products(dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """Return the seconds of a square matrix product in each dtype, the minimum of a few runs."""
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
    """Return a warning if `dtype` is slow on this CPU, with the equivalent fp32 recipe."""
    ratio = slowdown(seconds, dtype)
    if ratio is None:
        return []
    offload = "_offload" if offload_optimizer and zero_stage == 2 else ""  # the only fp32 recipe that offloads
    return [
        f"warning: on this CPU {name(dtype)} is {ratio:.0f} times slower than fp32 (matrices of {WIDTH} x {WIDTH}); "
        f"ds_configs/zero{zero_stage}_fp32{offload}.json is faster."
    ]


def name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in DeepSpeed's JSON."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
