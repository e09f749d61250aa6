"""Cases for comparing the estimates: models, DeepSpeed settings, ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaft.commands.estimate.recipe import Recipe
from megaft.config.train import OptimConfig
from megaft.weights.families import dimensions_of

BUCKET = 3_000_000
TINY = {"model_type": "gpt2", "n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": 8192, "n_positions": 256}
WIDE = TINY | {"n_embd": 768, "vocab_size": 1024}
"""Blocks larger than the embedding."""
SMALL = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 16_384, "n_positions": 256}


@dataclass(frozen=True, slots=True)
class Case:
    """A recipe and its name in the table."""

    name: str
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Passing:
    """One forward and backward pass of one rank's model, without an engine."""

    model: str
    dtype: str
    micro_batch_size: int
    context_length: int
    is_recomputed: bool = False
    tensor_parallel_size: int = 0
    """0 means transformers' model, 1 or more megatron-core's."""
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """For the table."""
        cut = f", megatron TP {self.tensor_parallel_size}" if self.tensor_parallel_size else ""
        recomputed = ", recomputed" if self.is_recomputed else ""
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        size = f"{self.micro_batch_size} x {self.context_length}"
        return f"{self.model}{cut}, {self.dtype}, {size}{recomputed}{dropout}"


PASSES = (
    Passing("gpt2", "bfloat16", 8, 1024),
    Passing("gpt2", "float32", 4, 1024, dropout=0.1),
    Passing("gpt2", "bfloat16", 1, 128),
    Passing("gpt2-medium", "bfloat16", 16, 1024, is_recomputed=True),
    Passing("gpt2-xl", "bfloat16", 4, 1024, dropout=0.1),
    Passing("megatron-2.5b", "bfloat16", 2, 1024),
    Passing("megatron-8.3b", "bfloat16", 1, 1024, is_recomputed=True),
    Passing("smollm2-135m", "bfloat16", 4, 2048),
    Passing("smollm2-135m", "float32", 2, 1024, is_recomputed=True),
    Passing("llama-3.1-8b", "bfloat16", 1, 8192, is_recomputed=True),
    Passing("gpt2", "bfloat16", 8, 1024, tensor_parallel_size=4, dropout=0.1),
    Passing("megatron-355m", "bfloat16", 8, 1024, is_recomputed=True, tensor_parallel_size=2),
    Passing("megatron-8.3b", "bfloat16", 4, 1024, tensor_parallel_size=8),
    Passing("megatron-8.3b", "bfloat16", 8, 1024, is_recomputed=True, tensor_parallel_size=8),
    Passing("llama-3.1-8b", "bfloat16", 2, 4096, tensor_parallel_size=8),
)


def _case(
    stage: int,
    ranks: int,
    dtype: str = "fp32",
    *,
    accumulation: int = 1,
    config: dict[str, Any] = TINY,
    zero: dict[str, Any] | None = None,
    half: dict[str, Any] | None = None,
    tensor_parallel_size: int = 0,
) -> Case:
    sizes = {"train_batch_size": 2 * accumulation * ranks, "train_micro_batch_size_per_gpu": 2}
    settings = {**sizes, "gradient_clipping": 1.0, "zero_optimization": {"stage": stage, **(zero or {})}}
    if stage:
        settings["zero_optimization"] |= {"reduce_bucket_size": BUCKET}
    if dtype != "fp32":
        settings[dtype] = {"enabled": True, **(half or {})}
    more = [
        *(f"{key} {value}" for key, value in (half or {}).items()),
        *(f"{key} to the host" for key in (zero or {}) if key.startswith("offload")),
    ]
    more += ["nothing kept gathered"] if "stage3_max_reuse_distance" in (zero or {}) else []
    more += [f"megatron TP {tensor_parallel_size}"] if tensor_parallel_size else []
    more += ["blocks larger than the embedding"] if config is WIDE else []
    recipe = Recipe(
        dims=dimensions_of(config, dropout=0.0),
        deepspeed=settings,
        context_length=128,
        world_size=ranks * max(tensor_parallel_size, 1),
        tensor_parallel_size=max(tensor_parallel_size, 1),
        is_megatron=tensor_parallel_size > 0,
        optim=OptimConfig(),
    )
    name = ", ".join([f"ZeRO {stage}, {dtype}, {ranks} data ranks, accumulation {accumulation}", *more])
    return Case(name, recipe)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BOTH = OFFLOAD | {"offload_param": {"device": "cpu"}}
ALONE = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 1000}
LOW_SCALE = {"initial_scale_power": 4}

ENGINES = (
    _case(0, 1),
    _case(0, 2, accumulation=2),
    _case(1, 2),
    _case(1, 2, accumulation=2),
    _case(2, 2),
    _case(3, 2),
    _case(1, 2, "bf16"),
    _case(1, 8, "bf16", accumulation=2),
    _case(1, 8, "bf16", accumulation=2, half={"immediate_grad_update": False}),
    _case(2, 2, "bf16"),
    _case(2, 8, "bf16", accumulation=2),
    _case(3, 2, "bf16", accumulation=2),
    _case(3, 8, "bf16", zero=ALONE),
    _case(3, 2, config=WIDE, zero=ALONE),
    _case(1, 2, "fp16", half=LOW_SCALE),
    _case(2, 2, "fp16", accumulation=2, half=LOW_SCALE),
    _case(0, 1, tensor_parallel_size=2),
    _case(1, 2, "bf16", tensor_parallel_size=2),
    _case(3, 2, "bf16", tensor_parallel_size=4),
    _case(2, 2, "bf16", zero=OFFLOAD),
    _case(1, 2, "bf16", accumulation=2, zero=OFFLOAD),
    _case(3, 2, "bf16", zero=OFFLOAD),
    _case(3, 2, "bf16", zero=BOTH),
)

RANKS = tuple(
    _case(stage, ranks, dtype, config=SMALL)
    for stage, ranks, dtype in ((0, 1, "fp32"), (1, 1, "bf16"), (2, 2, "bf16"), (3, 2, "fp32"))
)
