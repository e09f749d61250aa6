"""torch's global flags that change the bits of a result: TF32 and deterministic algorithms."""

from __future__ import annotations

import os
from typing import Any

import torch

DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else the order of cuBLAS's sums may vary if streams share its workspace
    "NCCL_ALGO": "Ring",  # else NCCL chooses an algorithm for the network it finds
    "NCCL_NVLS_ENABLE": "0",  # else NVLink SHARP: the NVSwitches sum, in an order of their own
}
NONDETERMINISM_NOTE = (
    "on CUDA, repeating this run gives the same losses up to rounding only, since the backward passes of attention and "
    "tied embeddings sum in no fixed order; --run.deterministic makes them bit-identical on GPUs of one model."
)
"""Note for runs on GPUs without --run.deterministic."""


def forbid_tf32() -> None:
    """Make fp32 matrix products and convolutions compute in fp32, whatever the environment says.

    NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which torch reads once, as the initial value of
    allow_tf32; so it is set again here.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # forbids TF32 in cuBLAS and cuDNN; NVIDIA documents no other value
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def set_before_cuda(is_deterministic: bool, tensor_parallel_size: int) -> None:
    """Set the flags and environment variables that CUDA and its libraries read once, at their start."""
    if is_deterministic:
        use_deterministic_algorithms()
    if tensor_parallel_size > 1:  # else megatron-core's all-reduces may not overlap with matrix products
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def use_deterministic_algorithms() -> None:
    """Make every operation bitwise reproducible, or raise; call it before anything runs on a GPU.

    torch passes the flag on to its compiler. `warn_only=True` would leave attention on faster, nondeterministic
    kernels.
    """
    os.environ.update(DETERMINISTIC_ENVIRONMENT)
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def current_flags() -> dict[str, Any]:
    """Return the values of these flags, to be recorded with a result."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
    }
