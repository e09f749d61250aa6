"""Attention kernel that torch chooses on a GPU, by the rules of torch 2.13's scaled_dot_product_attention.

The rules are those of ATen/native/transformers/cuda/sdp_utils.cpp for training: cuDNN comes first on data-center Hopper
and Blackwell GPUs, then FlashAttention, the memory-efficient kernel, and plain operations ("math").
"""

from __future__ import annotations

from typing import Literal

AttentionKernel = Literal["cuDNN", "FlashAttention", "memory-efficient", "math"]
ComputeCapability = tuple[int, int]

CUDNN_MAX_WIDTHS = {(9, 0): 256, (10, 0): 128}
"""Widest head of cuDNN's kernel, by GPUs on which torch tries cuDNN (above 9.15) first: H100, H200, B200."""
FLASH_MAX_WIDTH = 256
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""GPUs on which FlashAttention has no backward pass for some wide heads."""
DROPOUT_STEP = 1 / 16
"""cuDNN supports only multiples of this dropout probability."""


def attention_kernel(
    capability: ComputeCapability, dtype: str, *, has_mask: bool, dropout: float, head_width: int
) -> AttentionKernel:
    """Return the attention kernel of a training run.

    Args:
        capability: Compute capability of the GPU.
        dtype: "float32", "bfloat16" or "float16".
        has_mask: True for an explicit mask, which keeps documents apart; plain causal attention needs none.
        dropout: Dropout probability of attention.
        head_width: Width of a head.
    """
    is_half, is_aligned = dtype != "float32", head_width % (4 if dtype == "float32" else 8) == 0
    if is_half and is_aligned and _is_cudnn(capability, dropout, head_width):
        return "cuDNN"
    if is_half and not has_mask and _is_flash(capability, dropout, head_width):
        return "FlashAttention"
    if capability >= (5, 0) and is_aligned and (dtype != "bfloat16" or capability >= (8, 0)):
        return "memory-efficient"
    return "math"


def attention_note(
    capability: ComputeCapability, dtype: str, *, has_mask: bool, dropout: float, head_width: int
) -> str | None:
    """Return a sentence about the setting that prevents a faster attention kernel; None if none does."""

    def kernel(**changes: float | str) -> AttentionKernel:
        settings = {"dtype": dtype, "has_mask": has_mask, "dropout": dropout, "head_width": head_width} | changes
        return attention_kernel(capability, **settings)  # pyright: ignore[reportArgumentType]

    chosen = kernel()
    if chosen != "cuDNN" and kernel(dropout=DROPOUT_STEP) == "cuDNN":
        nearest = _supported_dropouts(dropout)
        return f"cuDNN's faster kernel does not support a dropout of {dropout:g}; it runs with {nearest}, or without."
    without_mask = kernel(has_mask=False)
    if has_mask and without_mask != chosen:
        return f"--attend-within-documents needs a mask, which {without_mask} does not support; it runs without one."
    half = "bfloat16" if capability >= (8, 0) else "float16"
    if dtype == "float32" and kernel(dtype=half) not in (chosen, "math"):
        return f"{kernel(dtype=half)} computes in half precision only; it runs with {half}."
    if chosen == "math":
        return f"no fused kernel supports {dtype} with heads of {head_width}; attention then stores all its weights."
    return None


def _is_cudnn(capability: ComputeCapability, dropout: float, head_width: int) -> bool:
    has_dropout = (dropout / DROPOUT_STEP).is_integer()
    return has_dropout and head_width <= CUDNN_MAX_WIDTHS.get(capability, 0)


def _is_flash(capability: ComputeCapability, dropout: float, head_width: int) -> bool:
    is_refused = 192 < head_width <= 224 or (head_width > 224 and dropout > 0)
    has_backward = capability not in SMALL_SHARED_MEMORY or not is_refused
    return capability >= (8, 0) and head_width <= FLASH_MAX_WIDTH and has_backward


def _supported_dropouts(dropout: float) -> str:
    below = int(dropout / DROPOUT_STEP) * DROPOUT_STEP
    return " or ".join(f"{each:g}" for each in (below, below + DROPOUT_STEP) if 0 < each < 1)
