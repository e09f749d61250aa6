"""Resolve a run's settings for its ranks, without torch, for train, validate, submit and estimate."""

from __future__ import annotations

from typing import Any

from megaft.base.checks import require
from megaft.config.deepspeed_json import ResolvedSettings, read_deepspeed_json, resolve
from megaft.config.optimizers import OPTIMIZERS
from megaft.config.parallelism import num_data_ranks
from megaft.config.train import OptimConfig, TrainConfig
from megaft.weights import manifest


def plan_settings(config: TrainConfig, world_size: int, *, has_cuda: bool) -> ResolvedSettings:
    """Read a run's DeepSpeed JSON and resolve it for its ranks, also for a run resumed on a different number of ranks.

    Args:
        config: The run's settings.
        world_size: Ranks of the run.
        has_cuda: True if the ranks have CUDA devices.

    Raises:
        ConfigError: Anything that cannot be trained with these settings on these ranks.
    """
    setup = plan_engine(
        read_deepspeed_json(config.deepspeed_config),
        world_size=world_size,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        is_megatron=config.model.backend == "megatron",
        optim=config.optim,
        has_cuda=has_cuda,
        resumed_batch_size=resumed_batch_size(config),
    )
    require(
        config.model.compile != "on" or setup.zero_stage < 3,
        "--model.compile is on, but zero_optimization.stage is 3, whose hooks inside blocks cannot be compiled. Use "
        "--model.compile off, or stage 2.",
    )
    return setup


def plan_engine(
    deepspeed_json: dict[str, Any],
    *,
    world_size: int,
    tensor_parallel_size: int,
    is_megatron: bool,
    optim: OptimConfig,
    has_cuda: bool,
    resumed_batch_size: int | None = None,
) -> ResolvedSettings:
    """Resolve a DeepSpeed JSON for the data-parallel ranks of a world size.

    Args:
        deepspeed_json: The JSON as returned by `read_deepspeed_json`.
        world_size: Number of ranks.
        tensor_parallel_size: Ranks that shard each matrix.
        is_megatron: True for a model of megatron-core.
        optim: The command line's settings of the optimizer.
        has_cuda: True if the ranks have CUDA devices.
        resumed_batch_size: Global batch size of the run to resume; None for a new run.

    Raises:
        ConfigError: The settings cannot be trained.
    """
    setup = resolve(
        deepspeed_json,
        world_size=num_data_ranks(world_size, tensor_parallel_size),
        optim=optim,
        has_cuda=has_cuda,
        resumed_batch_size=resumed_batch_size,
    )
    require(
        not (is_megatron and OPTIMIZERS[setup.optim.name].needs_whole_matrices),
        f"--optim.name is {setup.optim.name}, which needs whole matrices, but --model.backend megatron fuses or "
        "shards them. Set --optim.name adamw or --model.backend hugging-face.",
    )
    return setup


def resumed_batch_size(config: TrainConfig) -> int | None:
    """Return the global batch size of the run to resume; None for a new run."""
    newest = None if config.run.fresh else manifest.newest_manifest(config.run.dir)
    return newest["identity"].get("global_batch_size") if newest else None
