"""Roofline model of training speed: a prediction from FLOPs and memory traffic. docs/performance.md explains it.

All rates are assumptions about an H100. Other GPUs are assumed to reach the same shares of their data sheets' peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from megaft.base.hardware import Gpu, chunk_rows, data_sheet_flops, padded_entries
from megaft.commands.estimate.attention import AttentionKernel
from megaft.commands.estimate.memory import FLOAT, MicroBatch, has_bf16_engine
from megaft.config.deepspeed_json import ResolvedSettings
from megaft.weights.dimensions import num_elements

PRODUCT_SHARE, MEMORY_SHARE = 798 / 989, 2.76 / 3.35
"""Shares of the data sheet's FLOP/s that a large product reaches, and of its bytes/s that other kernels reach."""
ATTENTION_SHARES: dict[AttentionKernel, tuple[float, float]] = {
    "cuDNN": (300 / 989, 230 / 989),
    "FlashAttention": (190 / 989, 160 / 989),
}
"""Shares of the data sheet's FLOP/s that causal attention reaches, forward and backward."""
SUSTAINED_COMPUTE, SUSTAINED_MEMORY = 0.87, 0.95
"""Shares of these rates that a GPU holds for hours; the rates themselves hold for milliseconds."""
NUM_PROCESSORS, TILES = 132, {(128, 128): 0.90, (128, 192): 0.96, (128, 256): 1.0, (256, 128): 1.0}
"""Streaming multiprocessors, and the rate of each tile of a product relative to the best."""
ACCUMULATION_BYTES, CONVERTED_BYTES = 10, 18
"""Bytes per parameter to add a micro-batch's gradients to fp32 sums: in bf16 at stage 1 in one operation, else after a
conversion."""
STEP_BYTES = 54
"""Bytes per parameter of a step: norm 4, clipping 8, AdamW 28, rounded weights 6, zeroing 8."""


def product_share(m: int, n: int, k: int) -> float:
    """Return the rate of a product [m, k] @ [k, n] relative to that of a large one.

    Partly filled tiles, a partly filled last wave of tiles, and the start of each tile lower it.
    """

    def filled(height: int, width: int) -> float:
        rounds = ceil(ceil(m / height) * ceil(n / width) / NUM_PROCESSORS)
        return m * n / (rounds * NUM_PROCESSORS * height * width)

    best = max(filled(*tile) * rate for tile, rate in TILES.items())
    if ceil(m / 128) * ceil(n / 256) < NUM_PROCESSORS and k >= 2048:
        best = max(best, 0.75)  # split-K: the inner dimension is split over processors
    return min(1.0, best * k / (k + 128) * (8192 + 128) / 8192 / 0.97)


def state_bytes_of(work: MicroBatch, setup: ResolvedSettings, num_data_ranks: int) -> float:
    """Return the bytes moved per micro-batch to accumulate gradients and, with ZeRO over the ranks, to step."""
    accumulation = ACCUMULATION_BYTES if has_bf16_engine(setup) else CONVERTED_BYTES
    num_shares = num_data_ranks if setup.zero_stage else 1
    return num_elements(work.weights) * (accumulation + STEP_BYTES / num_shares / setup.gradient_accumulation_steps)


def predicted_rates(
    work: MicroBatch, gpu: Gpu, kernel: AttentionKernel, state_bytes: float, is_compiled: bool
) -> list[float] | None:
    """Return the tokens/s of one data-parallel rank: sustained, and in a short burst.

    Communication and the time of the host to launch kernels are not counted.

    Args:
        work: The micro-batch.
        gpu: The GPU.
        kernel: The attention kernel.
        state_bytes: Bytes moved per micro-batch to accumulate gradients and step the optimizer.
        is_compiled: True if blocks are compiled.

    Returns:
        None without a known peak or attention rate, or with tensor parallelism, where communication dominates.
    """
    peak = data_sheet_flops(gpu.name)
    if peak is None or kernel not in ATTENTION_SHARES or work.tensor_parallel_size > 1:
        return None
    forwards, passes = (2, 4 / 3) if work.is_recomputed else (1, 1)
    layers = sum(2 * m * n * k / product_share(m, n, k) * passes for m, n, k in _layer_products(work))
    head = sum(2 * m * n * k / product_share(m, n, k) for m, n, k in _head_products(work))
    attention = _attention_flops(work) * sum(
        times / share for times, share in zip((forwards, 2.5), ATTENTION_SHARES[kernel], strict=True)
    )
    compute = (work.dims.num_layers * layers + head) / (peak * PRODUCT_SHARE) + attention / peak
    moved = (
        work.dims.num_layers * work.num_tokens * _layer_bytes(work, is_compiled) * passes
        + _head_bytes(work)
        + state_bytes
    )
    memory = moved / (gpu.memory_bytes_per_second * MEMORY_SHARE)
    burst, sustained = compute + memory, compute / SUSTAINED_COMPUTE + memory / SUSTAINED_MEMORY
    return [work.num_tokens / sustained, work.num_tokens / burst]


def _layer_products(work: MicroBatch) -> Iterator[tuple[int, int, int]]:
    """Yield (m, n, k) of a layer's products: each matrix forward, and the gradients of its input and its weight."""
    for out, width in work.dims.matrices_of_layer(work.tensor_parallel_size, work.is_megatron):
        yield from ((work.num_tokens, out, width), (work.num_tokens, width, out), (out, width, work.num_tokens))


def _head_products(work: MicroBatch) -> Iterator[tuple[int, int, int]]:
    rows = chunk_rows(work.dims.vocab_size, "cuda")
    for begin in range(0, work.num_tokens, rows):
        size, width = min(rows, work.num_tokens - begin), work.dims.width
        entries = padded_entries(work.dims.vocab_size)
        yield from ((size, entries, width), (size, width, entries), (entries, width, size))


def _attention_flops(work: MicroBatch) -> float:
    """Return the FLOPs of a forward pass of causal attention, which computes half of each matrix."""
    dims = work.dims
    return 2.0 * dims.num_layers * work.num_tokens * work.context_length * dims.num_heads * dims.head_width


def _layer_bytes(work: MicroBatch, is_compiled: bool) -> float:
    """Return the bytes per token that a layer's kernels move besides products and attention, forward and backward.

    Counted by tools/benchmarks/kernel_counts.py. Eager: norms 14 times the width, residual additions 12, an activation
    5 times the inner width; LayerNorm's models split queries, keys and values and sum gradients of biases; gated ones
    multiply by a gate (9 times the inner width), add the gradients of matrices with one input, and rotate queries and
    keys.
    """
    dims, (norms, gated, gates, rotated) = work.dims, COMPILED if is_compiled else EAGER
    heads, groups = dims.num_heads * dims.head_width, dims.num_groups * dims.head_width
    if not dims.is_gated:
        biases = heads + 2 * groups + 2 * dims.width + dims.inner_width if dims.has_bias else 0
        values = norms * dims.width + 5 * dims.inner_width + 2 * (heads + 2 * groups) + biases
        masks = 4 * dims.width * (work.element_bytes + 0.5) if dims.dropout else 0
        return values * work.element_bytes + masks
    values = gated * dims.width + gates * dims.inner_width + rotated * (heads + groups)
    return values * work.element_bytes


EAGER, COMPILED = (26, 35, 14, 38), (21, 28, 8, 4)
"""Passes over the width without and with a gated MLP, over the inner width with one, and over queries and keys."""


def _head_bytes(work: MicroBatch) -> float:
    """Return the bytes that the loss moves: fp32 logits, read twice, and their gradient."""
    return float(work.num_tokens * padded_entries(work.dims.vocab_size) * (2 * FLOAT + work.element_bytes))
