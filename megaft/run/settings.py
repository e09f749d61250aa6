"""Resolve a run's settings for its ranks, without torch: train, validate, submit and estimate all call this."""

from __future__ import annotations

from typing import Any

from megaft.base.checks import require
from megaft.config.deepspeed_json import Resolved, read_deepspeed_json, resolve
from megaft.config.optimizers import OPTIMIZERS
from megaft.config.parallelism import num_data_ranks
from megaft.config.train import OptimConfig, TrainConfig
from megaft.weights import manifest


def plan_settings(config: TrainConfig, world_size: int, *, has_cuda: bool) -> Resolved:
    """Read the run's DeepSpeed JSON and resolve it for its ranks, or for another number of them where it continues.

    Args:
        config: The run's settings.
        world_size: Ranks of the run.
        has_cuda: Whether they have CUDA devices.

    Raises:
        ConfigError: Anything that cannot be trained with these settings on these ranks.
    """
    return plan_engine(
        read_deepspeed_json(config.deepspeed_config),
        world_size=world_size,
        tensor_parallel_size=config.parallel.tensor_parallel_size,
        is_megatron=config.model.backend == "megatron",
        optim=config.optim,
        has_cuda=has_cuda,
        resumed_batch_size=resumed_batch_size(config),
    )


def plan_engine(
    deepspeed_json: dict[str, Any],
    *,
    world_size: int,
    tensor_parallel_size: int,
    is_megatron: bool,
    optim: OptimConfig,
    has_cuda: bool,
    resumed_batch_size: int | None = None,
) -> Resolved:
    """Resolve a DeepSpeed JSON for the data-parallel ranks of so many ranks.

    Args:
        deepspeed_json: As `read_deepspeed_json` gives it.
        world_size: All ranks.
        tensor_parallel_size: Ranks that share each matrix.
        is_megatron: Whether the model is megatron-core's.
        optim: The command line's settings of the optimizer.
        has_cuda: Whether the ranks have CUDA devices.
        resumed_batch_size: Global batch of the run that continues, if one does.

    Raises:
        ConfigError: Anything that cannot be trained so.
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
        f"--optim.name is {setup.optim.name}, which looks at whole matrices, and those of --model.backend megatron are "
        "put together otherwise; give --optim.name adamw or --model.backend hugging-face.",
    )
    return setup


def resumed_batch_size(config: TrainConfig) -> int | None:
    """Return the global batch size of the run that the folder holds; None where there is none to continue."""
    newest = None if config.run.fresh else manifest.newest_manifest(config.run.dir)
    return newest["identity"].get("global_batch_size") if newest else None
