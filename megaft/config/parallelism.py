"""Rules of tensor parallelism: megatron-core's modules, and whole groups of ranks."""

from __future__ import annotations

from typing import Literal

from megaft.base.checks import require
from megaft.base.plural import counted

Backend = Literal["hugging-face", "megatron"]
"""Model implementation: transformers, or megatron-core, which supports tensor parallelism."""


def require_shardable(
    backend: Backend, size: int, setting: str = "--tensor-parallel-size", backend_setting: str = "--backend"
) -> None:
    """Raise ConfigError for a tensor-parallel size above 1 of transformers' modules.

    Args:
        backend: Model implementation.
        size: Ranks that share each matrix.
        setting: The user's name for that number.
        backend_setting: The user's name for the model implementation.
    """
    require(
        backend == "megatron" or size == 1,
        f"{setting} is {size}, but transformers' matrices are whole; give {backend_setting} megatron.",
    )


def num_data_ranks(world_size: int, tensor_parallel_size: int, setting: str = "--parallel.tensor-parallel-size") -> int:
    """Return the number of data-parallel groups that ranks form, each of which shares the matrices of one model.

    Raises:
        ConfigError: The last group would not be whole.
    """
    groups, rest = divmod(world_size, tensor_parallel_size)
    more = (groups + 1) * tensor_parallel_size
    require(
        rest == 0,
        f"{setting} is {tensor_parallel_size}, but this runs on {counted(world_size, 'rank')}; start a multiple of it, "
        f"such as {more}.",
    )
    return groups
