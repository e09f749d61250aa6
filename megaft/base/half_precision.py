"""Half precision on CPUs, for which torch has fast kernels only on newer processors.

Without AVX-512 or AMX (fp16: AVX512-FP16 or AMX-FP16), a product takes up to 70 times as long as in fp32.
"""

from __future__ import annotations

import torch

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Half-precision dtypes, with their names in DeepSpeed's JSON."""


def is_slow_on_cpu(dtype: torch.dtype) -> bool:
    """Return True if torch has no fast kernel for half-precision products on this CPU."""
    kernels = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return not torch.backends.mkldnn.is_available() or not getattr(torch.ops.mkldnn, kernels[dtype])()


SLOW_ON_CPU = tuple(filter(is_slow_on_cpu, NAMES))
"""Dtypes that this CPU multiplies in fp32.

They depend on its instructions, not on a measured time, so that a resumed run computes the same bits.
"""


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which matrices of `dtype` are multiplied."""
    return torch.float32 if device.type == "cpu" and dtype in SLOW_ON_CPU else dtype


def megatron_note(dtype: torch.dtype, zero_stage: int) -> str:
    """Return the note for a run whose layers, megatron-core's, use the slow kernels."""
    return (
        f"warning: this CPU has no fast instructions for {NAMES[dtype]}, and megatron-core does not multiply in fp32: "
        f"training is up to 70 times slower than in fp32. ds_configs/zero{zero_stage}_fp32.json is faster."
    )
