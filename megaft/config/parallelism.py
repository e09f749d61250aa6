"""Checks of the tensor-parallel size against the model implementation and the number of ranks."""

from __future__ import annotations

from typing import Literal

from megaft.base.checks import require
from megaft.base.plural import counted

Backend = Literal["hugging-face", "megatron"]
"""Model implementation: transformers, or megatron-core, which supports tensor parallelism."""


def require_shardable(
    backend: Backend, size: int, setting: str = "--tensor-parallel-size", backend_setting: str = "--backend"
) -> None:
    """Raise ConfigError if the backend is transformers and the tensor-parallel size is above 1.

    Args:
        backend: Model implementation.
        size: Tensor-parallel size.
        setting: Flag that sets the size, for the message.
        backend_setting: Flag that sets the model implementation, for the message.
    """
    require(
        backend == "megatron" or size == 1,
        f"{setting} is {size}, but only megatron-core's models are sharded. Set {backend_setting} megatron.",
    )


def num_data_ranks(world_size: int, tensor_parallel_size: int, setting: str = "--parallel.tensor-parallel-size") -> int:
    """Return the data-parallel size: world size over tensor-parallel size.

    Raises:
        ConfigError: The tensor-parallel size does not divide the world size.
    """
    groups, rest = divmod(world_size, tensor_parallel_size)
    more = (groups + 1) * tensor_parallel_size
    require(
        rest == 0,
        f"{setting} is {tensor_parallel_size}, which does not divide {counted(world_size, 'rank')}. Start a multiple "
        f"of {tensor_parallel_size} ranks, for example {more}.",
    )
    return groups
