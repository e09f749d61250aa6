"""Tables of DeepSpeed JSON keys: passed on, rejected with a reason, or restricted to one value.

They follow DeepSpeed 0.19.8; tests/config/test_deepspeed_json.py compares them with its parser.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from megaft.base.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
GLOBAL_BATCH, MICRO_BATCH = "train_batch_size", "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
BATCH_KEYS = (GLOBAL_BATCH, MICRO_BATCH, ACCUMULATION)

PASSED_ON = (  # top-level keys passed to DeepSpeed unchanged
    *("bf16", "fp16", "data_types", "zero_optimization", "gradient_clipping"),
    *("prescale_gradients", "gradient_predivide_factor", "comms_logger", "flops_profiler", "timers", "log_level"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc"),
)


class BlockTranslation(NamedTuple):
    """Translation of optimizer or scheduler blocks; a parameter whose default is `...` is required."""

    types: tuple[str, ...]
    """DeepSpeed's `type` names for this block."""
    takes: Mapping[str, tuple[str, Any]]
    """By parameter: the OptimConfig field, and DeepSpeed's default (None: the field keeps its value)."""
    only: Mapping[str, tuple[Any, Any]]
    """By parameter: the only supported value, and DeepSpeed's default."""
    sets: Mapping[str, Any] = {}
    """OptimConfig fields that the type alone decides."""


BLOCK_KEYS = {  # known keys of each block
    "bf16": (
        *("enabled", "immediate_grad_update", "check_grad_overflow", "bf16_master_weights_and_grads"),
        "bf16_optimizer_states",
    ),
    "fp16": (
        *("enabled", "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"),
        *("consecutive_hysteresis", "min_loss_scale", "fp16_master_weights_and_grads"),
    ),
    "data_types": ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"),
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
    "zero_optimization": (
        *("stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce"),
        *("allgather_partitions", "allgather_bucket_size", "overlap_comm", "compute_grad_norm", "sub_group_size"),
        *("load_from_fp32_weights", "elastic_checkpoint", "offload_param", "offload_optimizer", "zenflow"),
        *("cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload", "stage3_prefetch_bucket_size"),
        *("stage3_param_persistence_threshold", "stage3_model_persistence_threshold", "stage3_max_live_parameters"),
        *("stage3_max_reuse_distance", "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters"),
        *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "legacy_stage1"),
        *("stage3_allgather_sequential", "stage3_gather_fp16_weights_on_model_save", "round_robin_gradients"),
        *("parameter_alignment", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_gradients"),
        *("zero_quantized_nontrainable_weights", "memory_efficient_linear", "pipeline_loading_checkpoint"),
        *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "leaf_module"),
        "save_muon_momentum_buffer_in_memory",
    ),
    "zero_optimization.offload_optimizer": (
        *("device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init"),
        *("ratio", "super_offload", "cpuadam_cores_perc"),
    ),
    "zero_optimization.offload_param": (
        *("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"),
    ),
}
HOLDS_STRINGS = ("device", "nvme_path", "leaf_module")  # keys of those blocks whose values are not numbers or booleans

SAMPLES = "megaft controls the order and length of samples (--data.*), so this has no effect or conflicts"
METRICS = "megaft writes metrics itself: use --metrics.wandb, --metrics.tensorboard or RUN/metrics.jsonl"
CHECKPOINT = "megaft writes its own checkpoints and never calls DeepSpeed's, so this has no effect"
REMOVED = "DeepSpeed 0.19 has removed it"
TENSOR = (
    "it does not shard embeddings and the output layer, and checkpoints would store shards as whole matrices: use "
    "--model.backend megatron with --parallel.tensor-parallel-size (docs/parallelism.md)"
)
SEQUENCE = (
    "at ZeRO 0 to 2 its gradient is too large by the sequence-parallel size, and packed documents attend to "
    "each other (docs/parallelism.md): use --model.activation-checkpointing and a smaller micro-batch"
)
PARALLEL = "megaft supports neither pipeline nor expert parallelism (docs/parallelism.md)"
LOSSY_COMMUNICATION = "it rounds values before ranks exchange them, so the result would depend on the number of GPUs"
MASTERS = "megaft keeps fp32 weights, gradients and moments, so that a checkpoint is exact at every ZeRO stage"
UNSAVED_STATE = "it keeps training state where megaft's checkpoints do not save it"
USE_OFFLOAD = "it is deprecated: write offload_optimizer or offload_param with a device"

REFUSED = {  # DeepSpeed's top-level keys that megaft does not support
    "amp": "apex and DeepSpeed removed it: use bf16 or fp16",
    "bfloat16": "it is the old name of bf16: rename it",
    "torch_autocast": "precision is bf16 or fp16 with fp32 masters: use one of these blocks",
    "data_efficiency": SAMPLES,
    "curriculum_learning": SAMPLES,
    "dataloader_drop_last": SAMPLES,
    "progressive_layer_drop": REMOVED,
    "compression_training": REMOVED,
    "quantize_training": REMOVED,
    "eigenvalue": REMOVED,
    "sparse_attention": REMOVED,
    "sparse_gradients": REMOVED,
    "graph_harvesting": REMOVED,
    "nebula": REMOVED,
    "elasticity": f"{REMOVED}, and megaft resumes on another number of GPUs by itself",
    "weight_quantization": "it is for inference",
    "hybrid_engine": "it is for generation inside reinforcement learning",
    "autotuning": "it restarts the program with other settings: choose a file of ds_configs/",
    "pipeline": PARALLEL,
    "tensor_parallel": TENSOR,
    "expert_parallel": PARALLEL,
    "use_data_before_expert_parallelism": PARALLEL,
    "sequence_parallel_size": SEQUENCE,
    "data_parallel_size": SEQUENCE,
    "seq_parallel_communication_data_type": SEQUENCE,
    "disable_allgather": "DeepSpeed ignores it",
    "vocabulary_size": "it comes from the model",
    "activation_checkpointing": "the models do not use DeepSpeed's: use --model.activation-checkpointing",
    "compile": "it acts only on engine.compile(), which megaft does not call",
    "tensorboard": METRICS,
    "wandb": METRICS,
    "csv_monitor": METRICS,
    "comet": METRICS,
    "checkpoint": CHECKPOINT,
    "datastates_ckpt": CHECKPOINT,
    "aio": "it configures NVMe offload, and megaft's checkpoints cannot read state on NVMe",
}

ONLY = {  # key: the only supported value (None: remove the key), and the reason
    "managed_gradient_accumulation": (True, "the training loop leaves accumulation to the engine"),
    "gradient_allreduce_op": ("mean", "the training loop undoes the mean to weight every token of a step alike"),
    "zero_allow_untested_optimizer": (True, "megaft hands the engine its own optimizer"),
    "zero_force_ds_cpu_optimizer": (False, "megaft hands the engine its own optimizer, also with offload"),
    "data_types.grad_accum_dtype": ("fp32", "a half-precision sum of gradients depends on how the batch is split"),
    "communication_data_type": ("fp32", LOSSY_COMMUNICATION),
    "optimizer.legacy_fusion": (False, "it applies only to LAMB"),
    "bf16.bf16_master_weights_and_grads": (False, MASTERS),
    "bf16.bf16_optimizer_states": (False, MASTERS),
    "fp16.fp16_master_weights_and_grads": (False, MASTERS),
    "zero_optimization.compute_grad_norm": (True, "the gradient norm is logged and guarded"),
    "zero_optimization.zero_quantized_weights": (False, LOSSY_COMMUNICATION),
    "zero_optimization.zero_quantized_gradients": (False, LOSSY_COMMUNICATION),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, LOSSY_COMMUNICATION),
    "zero_optimization.zero_hpz_partition_size": (1, UNSAVED_STATE),
    "zero_optimization.zenflow": (None, "its delayed updates make the result depend on timing"),
    "zero_optimization.cpu_offload": (None, USE_OFFLOAD),
    "zero_optimization.cpu_offload_param": (None, USE_OFFLOAD),
    "zero_optimization.cpu_offload_use_pin_memory": (None, USE_OFFLOAD),
    "zero_optimization.offload_optimizer.ratio": (1, UNSAVED_STATE),
    "zero_optimization.offload_optimizer.super_offload": (False, UNSAVED_STATE),
}

FILLED_IN = {  # defaults for keys that the JSON does not set
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "data_types.grad_accum_dtype": "fp32",
    "communication_data_type": "fp32",  # else DeepSpeed rounds sums over ranks, at stage 1 on one rank too
    "gradient_clipping": 1.0,  # DeepSpeed's default, made explicit
    "timers.throughput.enabled": False,  # it waits for the GPU at every step; megaft times steps itself
}
FILLED_IN_BF16 = {
    "bf16.check_grad_overflow": True,  # skip a step whose gradient is not finite; stage 1 always does
    "bf16.immediate_grad_update": True,  # stage 1 adds a gradient to its fp32 sum at once, and frees it
}

TOP_LEVEL_ONLY = (key for key in ONLY if "." not in key)
KNOWN_KEYS = (*BATCH_KEYS, *PASSED_ON, *REFUSED, "optimizer", "scheduler", *TOP_LEVEL_ONLY)


def fail(path: str, value: Any, rule: str) -> NoReturn:
    """Raise ConfigError for the value at a path of the JSON; `rule` says what is allowed."""
    raise ConfigError(f"DeepSpeed JSON: {path} is {json.dumps(value)}; {rule}")


def refuse_unknown_keys(keys: Iterable[str], known: tuple[str, ...], prefix: str) -> None:
    """Raise ConfigError for an unknown key, and suggest the nearest known key."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known keys are {', '.join(known)}."
            raise ConfigError(f"DeepSpeed JSON: {prefix}{key} is not a key of DeepSpeed; {hint}")
