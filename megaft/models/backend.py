"""Model implementation: transformers, or megatron-core, which supports tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaft.base.checks import require
from megaft.config.parallelism import Backend, num_data_ranks, require_shardable


def backend_of(source: str, requested: Backend | None, tensor_parallel_size: int) -> Backend:
    """Return the model implementation: by default transformers, or megatron-core for a folder in megatron's format.

    Args:
        source: Folder, file or hub name of the model.
        requested: The user's choice; None for the default.
        tensor_parallel_size: Ranks over which each matrix is sharded.

    Raises:
        ConfigError: The requested implementation cannot run the model, or not with this tensor-parallel size.
    """
    from megaft.weights.megatron_folder import is_megatron_folder

    is_converted = is_megatron_folder(Path(source))
    backend: Backend = requested or ("megatron" if is_converted else "hugging-face")
    require(
        backend == "megatron" or not is_converted,
        f"--backend is hugging-face, but {source} is in megatron's format; drop --backend, "
        "or convert the model with megaft convert --format hugging-face.",
    )
    require_shardable(backend, tensor_parallel_size)
    return backend


def backend_of_model(language_model: Any) -> Backend:
    """Return the implementation of a model that has been built."""
    return getattr(language_model, "backend", "hugging-face")


def require_whole_groups(world_size: int, tensor_parallel_size: int) -> None:
    """Raise ConfigError unless the world size is a multiple of the tensor-parallel size."""
    num_data_ranks(world_size, tensor_parallel_size, "--tensor-parallel-size")
