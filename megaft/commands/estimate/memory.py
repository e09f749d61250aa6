"""Memory model of one rank in bytes, by closed formulas; docs/estimates.md compares them with measurements.

It counts what DeepSpeed 0.19 and torch allocate: ZeRO's partitions are padded, its buckets have full size from the
first gradient on, half-precision engines keep fp32 gradients, and a layer saves what its backward pass needs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any

from megaft.base.hardware import chunk_rows, padded_entries
from megaft.config.deepspeed_json import ResolvedSettings
from megaft.config.train import bytes_per_parameter
from megaft.weights.dimensions import Dimensions, ShapeCounts, num_elements

FLOAT = 4
BUCKET = 500_000_000
"""Default elements of DeepSpeed's reduce bucket, and of stage 0's reduction buffer."""
STAGE_3 = {  # DeepSpeed's defaults, in elements
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch on one rank."""

    dims: Dimensions
    micro_batch_size: int
    context_length: int
    tensor_parallel_size: int = 1
    is_megatron: bool = False
    is_recomputed: bool = False
    """True if each layer keeps only its input."""
    element_bytes: int = 2
    """Bytes per weight and per activation."""

    @property
    def joins_gradients(self) -> bool:
        """True if a tied embedding and the output layer share one fp32 gradient (megaft/models/tied_embedding.py)."""
        return self.dims.is_tied and not self.is_megatron

    @property
    def num_tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.micro_batch_size * self.context_length

    @property
    def weights(self) -> ShapeCounts:
        """The parameters of this rank, before ZeRO."""
        return self.dims.parameter_shapes(self.tensor_parallel_size, self.is_megatron)


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Bytes of weights, gradients, optimizer states and buckets, and what a step adds."""

    weights: int
    master_weights: int
    """fp32 copies that the optimizer steps."""
    optimizer: int
    """Moments of the optimizer."""
    gradients: int
    """Gradients at the end of a step's last backward pass, when they are largest."""
    gradients_before: int
    """Gradients that are allocated when that pass begins."""
    gradients_reduced: int
    """Gradients that are left when the optimizer steps."""
    buckets: int = 0
    """Buckets in which gradients are reduced."""
    buckets_before: int = 0
    """Buckets that are already allocated when the last backward pass begins."""
    gathered: int = 0
    """Largest size of gathered parameters at stage 3."""
    reducing: int = 0
    """Temporaries of the reduction of gradients after the last backward pass."""
    stepping: int = 0
    """Temporaries of the optimizer step and the gradient norm."""
    host: int = 0
    """Bytes offloaded to host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes that the forward pass saves for the backward pass, and temporary ones of both."""

    saved: int
    """Saved activations of the whole model."""
    first: int
    """Saved activations of the first layer, whose backward pass is the last."""
    layer: int
    """Largest temporaries of one layer's backward pass, with those of its recomputation."""
    head: int
    """Gradient of the output layer's weight during the last layer's backward pass."""
    waiting: int
    """Part of it that is still held, besides the gradients, in the first layer's: it waits for a tied embedding's."""
    loss: int
    """Largest temporaries of the output layer and its loss."""
    embedding: int
    """Largest temporaries of the embedding's backward pass."""


def activations(work: MicroBatch) -> Activations:
    """Return the activations of one micro-batch: those that torch's autograd saves, and the largest temporaries.

    Attention is torch's fused kernel, which saves its inputs, output and one number per query and head; dropout saves a
    byte per element.
    """
    dims, itemsize, tokens = work.dims, work.element_bytes, work.num_tokens
    stream, inner = tokens * dims.width * itemsize, tokens * dims.inner_width // work.tensor_parallel_size * itemsize
    of_layer = tokens * _bytes_of_layer(work)
    kept = stream if work.is_recomputed else of_layer
    vocab_rows = -(-dims.vocab_size // work.tensor_parallel_size)
    padded_rows = padded_entries(vocab_rows)
    head_size, padded_size = vocab_rows * dims.width, padded_rows * dims.width
    is_rounded = itemsize < FLOAT
    # Forward, beside the fp32 gradient of the output layer's weight: the padded weight, and of a chunk the fp32 logits
    # and their gradient (a sharded vocabulary's log-sum-exp takes a second fp32 tensor). Backward: that gradient,
    # rounded, unless a tied embedding adds to it.
    logit_bytes = 2 * FLOAT if work.tensor_parallel_size > 1 else FLOAT + itemsize
    forward = min(chunk_rows(vocab_rows, "cuda"), tokens) * padded_rows * logit_bytes
    forward += padded_size * itemsize if padded_rows > vocab_rows else 0
    rounded = head_size * itemsize * (is_rounded and not work.joins_gradients)
    factors = 2 if dims.is_gated else 1  # gradients of a gated MLP's two factors, or of an activation
    return Activations(
        saved=dims.num_layers * kept + tokens * _bytes_around_layers(work),
        first=kept,
        layer=stream + factors * inner + (of_layer - stream if work.is_recomputed else 0),
        loss=padded_size * FLOAT + max(forward, rounded) + stream * (2 + work.is_megatron),
        **_vocabulary_gradients(work, head_size, padded_size),
    )


def _vocabulary_gradients(work: MicroBatch, head_size: int, padded_size: int) -> dict[str, int]:
    """Return the fields of `Activations` about the gradients of output layer and embedding."""
    rows, itemsize = work.num_tokens * work.dims.width, work.element_bytes
    if work.joins_gradients:  # the embedding adds fp32 rows to the output layer's fp32 gradient, then rounds it
        waiting = padded_size * FLOAT * (itemsize < FLOAT)
        added = waiting + rows * FLOAT * (itemsize < FLOAT)
        return {"head": padded_size * FLOAT, "waiting": waiting, "embedding": added + rows * itemsize}
    # If tied: the output layer's, its own, and the sum.
    summed = 2 * head_size * itemsize * work.dims.is_tied
    return {"head": head_size * itemsize, "waiting": 0, "embedding": summed + rows * itemsize}


def _bytes_of_layer(work: MicroBatch) -> int:
    """Return the bytes per token that a layer saves: inputs of the layer, its matrices, norms and activations."""
    dims, itemsize, size = work.dims, work.element_bytes, work.tensor_parallel_size
    attention = dims.num_heads * dims.head_width // size
    groups = dims.num_groups * dims.head_width // size
    inner = dims.inner_width // size
    fused = itemsize * (2 * attention + 2 * groups) + FLOAT * dims.num_heads // size
    # Two fused norms: input, output, and in fp32 1 / deviation and, of LayerNorm, the mean.
    norms = 4 * dims.width * itemsize + (4 if dims.norm == "LayerNorm" else 2) * FLOAT
    if not dims.is_gated:
        return norms + fused + 2 * inner * itemsize + (2 * dims.width if dims.dropout else 0)
    if work.is_megatron:  # v keeps the joint q, k and v tensor alive; gate and values are saved twice
        return norms + fused + itemsize * (attention + groups) + 5 * inner * itemsize
    return norms + fused + 4 * inner * itemsize


def _bytes_around_layers(work: MicroBatch) -> int:
    """Return the bytes per token saved outside layers: the embedding's dropout mask, the final norm, labels."""
    dims = work.dims
    has_mask = dims.norm == "LayerNorm" and dims.dropout > 0
    return dims.width * (work.element_bytes + has_mask) + 24


def states(
    weights: ShapeCounts,
    setup: ResolvedSettings,
    num_ranks: int,
    matrices: tuple[int, ...] = (),
    rank: int | None = None,
    layer: tuple[int, ...] = (),
) -> States:
    """Return the bytes of weights, gradients, optimizer states and buckets on one rank.

    Args:
        weights: The parameters of a data-parallel rank before ZeRO.
        setup: DeepSpeed settings resolved for that number of ranks.
        num_ranks: Data-parallel ranks.
        matrices: Elements of each matrix among the weights, in order.
        rank: The data-parallel rank; None for the one with the most memory.
        layer: Elements of each matrix of a layer, if stage 3 gathers whole layers.
    """
    if setup.zero_stage == 0:
        return _unsharded(weights, setup)
    if setup.zero_stage == 3:
        return _stage_3(weights, setup, num_ranks, layer)
    if has_bf16_engine(setup):
        return _bf16_engine(weights, setup, num_ranks)
    return _stages_1_2(weights, setup, num_ranks, boundary_elements(matrices, num_ranks, rank))


def element_bytes(setup: ResolvedSettings) -> int:
    """Return the bytes per weight in the forward pass."""
    return FLOAT if setup.dtype == "float32" else 2


def flat_size(weights: ShapeCounts, num_ranks: int) -> int:
    """Return the elements of the flat buffers of stages 1 and 2: matrices, then vectors, each padded for the ranks."""
    vectors = sum(prod(shape) * number for shape, number in weights.items() if len(shape) == 1)
    unit = 2 * num_ranks
    return sum(-(-numel // unit) * unit for numel in (num_elements(weights) - vectors, vectors))


@cache
def boundary_elements(sizes: tuple[int, ...], num_ranks: int, rank: int | None = None) -> int:
    """Return how many elements of a rank's first and last parameter lie outside its partition of the flat buffer.

    Args:
        sizes: Elements of each parameter, in order.
        num_ranks: Number of partitions, which have equal size.
        rank: The partition; None for the largest result of all.
    """
    partition, ends = -(-sum(sizes) // (2 * num_ranks)) * 2, list(accumulate(sizes))
    starts = [0, *ends]
    ranks = range(num_ranks) if rank is None else [rank]
    first = [bisect_right(ends, partition * index) for index in ranks]
    last = [bisect_left(starts, partition * (index + 1), hi=len(sizes)) for index in ranks]
    return max(0, *(starts[end] - starts[begin] - partition for begin, end in zip(first, last, strict=True)))


def _moment_bytes(setup: ResolvedSettings) -> int:
    """Return the bytes per parameter of the optimizer's moments."""
    return bytes_per_parameter(setup.optim) - FLOAT


def _zero(setup: ResolvedSettings, key: str, default: Any) -> Any:
    return setup.engine_config.get("zero_optimization", {}).get(key, default)


def _sent_bytes(setup: ResolvedSettings) -> int:
    """Return the bytes per gradient element in communication."""
    dtype = setup.engine_config.get("communication_data_type")
    return element_bytes(setup) if dtype is None else FLOAT if dtype == "fp32" else 2


def _largest(weights: ShapeCounts) -> int:
    return max(map(prod, weights))


def _unsharded(weights: ShapeCounts, setup: ResolvedSettings) -> States:
    total = num_elements(weights) * FLOAT
    return States(
        weights=total,
        master_weights=0,
        optimizer=num_elements(weights) * _moment_bytes(setup),
        gradients=total,
        gradients_before=total if setup.gradient_accumulation_steps > 1 else 0,
        gradients_reduced=total,
        reducing=min(total, (BUCKET + _largest(weights)) * FLOAT),
    )


def has_bf16_engine(setup: ResolvedSettings) -> bool:
    """Return True if DeepSpeed trains with its BF16_Optimizer."""
    return setup.zero_stage == 1 and setup.dtype == "bfloat16" and not setup.offload_optimizer


def _bf16_engine(weights: ShapeCounts, setup: ResolvedSettings, num_ranks: int) -> States:
    """Return the states of BF16_Optimizer: every rank keeps all gradients in fp32."""
    flat = flat_size(weights, num_ranks)
    is_immediate = setup.engine_config["bf16"].get("immediate_grad_update", False)
    rounded = 0 if is_immediate else 2 * num_elements(weights)
    is_one_bucket = flat <= BUCKET
    return States(
        weights=2 * flat,
        master_weights=FLOAT * flat // num_ranks,
        optimizer=_moment_bytes(setup) * flat // num_ranks,
        gradients=FLOAT * flat + rounded,
        gradients_before=FLOAT * flat + (rounded if setup.gradient_accumulation_steps > 1 else 0),
        gradients_reduced=FLOAT * flat + rounded,
        reducing=FLOAT * flat * is_one_bucket + (2 * flat if _sent_bytes(setup) < FLOAT else 0),
    )


def _stages_1_2(weights: ShapeCounts, setup: ResolvedSettings, num_ranks: int, boundary: int) -> States:
    flat, total, itemsize = flat_size(weights, num_ranks), num_elements(weights), element_bytes(setup)
    local, is_stage_1, accumulates = flat // num_ranks, setup.zero_stage == 1, setup.gradient_accumulation_steps > 1
    bucket = int(_zero(setup, "reduce_bucket_size", BUCKET)) * (FLOAT if is_stage_1 else itemsize)
    bucket *= 2 if _zero(setup, "overlap_comm", False) else 1
    offloads, is_rounded = setup.offload_optimizer, itemsize < FLOAT
    local_gradients = FLOAT * local
    device_gradients = local_gradients if is_rounded or not offloads else 0
    # In fp32, gradients of the parameters at the partition's ends are kept in full.
    reduced = device_gradients if is_rounded else device_gradients + FLOAT * boundary
    gradients = FLOAT * total if is_stage_1 else reduced
    optimizer = (FLOAT + _moment_bytes(setup)) * local
    norm = 8 * min(_largest(weights), local)  # computed in float64
    copied = FLOAT * min(bucket // itemsize, total) if itemsize < _sent_bytes(setup) and not is_stage_1 else 0
    largest = itemsize * _largest(weights)
    return States(
        weights=itemsize * flat,
        master_weights=0 if offloads else FLOAT * local,
        optimizer=0 if offloads else _moment_bytes(setup) * local,
        gradients=gradients,
        gradients_before=gradients if accumulates else 0,
        gradients_reduced=reduced,
        buckets=bucket + copied + (largest if offloads or (is_stage_1 and is_rounded) else 0),
        buckets_before=(bucket if is_stage_1 and accumulates else 0) + (largest if offloads else 0),
        reducing=max(0, local_gradients - bucket) if is_stage_1 else 0,
        stepping=max(norm, 0 if is_rounded else device_gradients),
        host=(optimizer + local_gradients + itemsize * local + largest) if offloads else 0,
    )


def _stage_3(weights: ShapeCounts, setup: ResolvedSettings, num_ranks: int, layer: tuple[int, ...]) -> States:
    setting = {key: int(_zero(setup, key, default)) for key, default in STAGE_3.items()}
    itemsize, offloads = element_bytes(setup), setup.offload_optimizer
    local = sum(-(-prod(shape) // num_ranks) * number for shape, number in weights.items())
    threshold = setting["stage3_param_persistence_threshold"]
    persistent = num_elements(Counter({shape: number for shape, number in weights.items() if prod(shape) <= threshold}))
    at_once = max(_largest(weights), sum(size for size in layer if size > threshold))
    ahead = setting["stage3_max_reuse_distance"] // 2 + setting["stage3_prefetch_bucket_size"] + at_once
    bucket, sent = int(_zero(setup, "reduce_bucket_size", BUCKET)), _sent_bytes(setup)
    copied = min(bucket, num_elements(weights))  # to send, and this rank's partition in fp32
    is_away = _zero(setup, "offload_param", {}).get("device") == "cpu"
    sharded, masters, moments, gradients = itemsize * local, FLOAT * local, _moment_bytes(setup) * local, FLOAT * local
    return States(
        weights=itemsize * persistent + (0 if is_away else sharded),
        master_weights=0 if offloads else masters,
        optimizer=0 if offloads else moments,
        gradients=0 if offloads else gradients,
        gradients_before=0 if offloads else gradients,
        gradients_reduced=0 if offloads else gradients,
        buckets=bucket * sent + copied * sent + copied * FLOAT // num_ranks,
        buckets_before=bucket * sent,
        gathered=itemsize * min(num_elements(weights) - persistent, ahead),
        stepping=0 if offloads else min(gradients, FLOAT * setting["sub_group_size"]),
        host=(sharded if is_away else 0) + (masters + moments + 2 * gradients if offloads else 0),
    )


def phases(held: States, work: Activations) -> dict[str, dict[str, int]]:
    """Return the memory components in each phase of a step that can have the peak."""
    steady = {"weights": held.weights, "master_weights": held.master_weights, "optimizer": held.optimizer}
    around = {"gradients": held.gradients_before, "activations": work.saved, "gathered": held.gathered}
    return {
        "loss": {**steady, **around, "loss": work.loss, "buckets": held.buckets_before},
        "last layer's backward": {**steady, **around, "temporaries": work.layer + work.head, "buckets": held.buckets},
        "first layer's backward": {
            **steady,
            "gradients": held.gradients,
            "activations": work.first,
            "gathered": held.gathered,
            "temporaries": max(work.layer + work.waiting, work.embedding),
            "buckets": held.buckets,
        },
        "reduction": {**steady, "gradients": held.gradients, "buckets": held.buckets, "temporaries": held.reducing},
        "step": {
            **steady,
            "gradients": held.gradients_reduced,
            "buckets": held.buckets_before,
            "temporaries": held.stepping,
        },
    }
