"""torch's global switches that change the bits of a result: TF32 and deterministic algorithms."""

from __future__ import annotations

import os
from typing import Any

import torch

DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else cuBLAS may sum in another order when streams share its workspace
    "NCCL_ALGO": "Ring",  # else NCCL chooses by what it measures of the network
    "NCCL_NVLS_ENABLE": "0",  # else NVLink SHARP, in which the NVSwitches add up
}
NOT_EXACT = (
    "On CUDA the same run again gives the same losses to rounding only, since attention's backward pass adds in no "
    "fixed order; --run.deterministic makes them equal bit for bit on GPUs of one model."
)


def forbid_tf32() -> None:
    """Let fp32 matrix products and convolutions be fp32, whatever the environment says.

    NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which torch reads once, as the
    initial value of allow_tf32; so it is set again here.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # 0 forbids it in cuBLAS and cuDNN, and is all that NVIDIA documents
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def set_before_cuda(is_deterministic: bool, tensor_parallel_size: int) -> None:
    """Set what CUDA and its libraries read once, when they start."""
    if is_deterministic:
        use_deterministic_algorithms()
    if tensor_parallel_size > 1:  # megatron-core's all-reduces overlap with products in this order only
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def use_deterministic_algorithms() -> None:
    """Let every operation give the same bits each time, or raise; call it before anything runs on a GPU.

    torch then tells its compiler too. `warn_only=True` would leave attention on its faster, nondeterministic kernels.
    """
    os.environ.update(DETERMINISTIC_ENVIRONMENT)
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def switches() -> dict[str, Any]:
    """Return the switches' values, for the record beside a result."""
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "is_deterministic": torch.are_deterministic_algorithms_enabled(),
    }
