"""Model implementation: transformers, or megatron-core, which supports tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megaft.base.checks import require
from megaft.base.plural import counted

Backend = Literal["hugging-face", "megatron"]


def backend_of(source: str, asked: Backend | None, tensor_parallel_size: int) -> Backend:
    """Return the model implementation: by default transformers, or megatron-core for a folder in megatron's format.

    Args:
        source: Where the model's files are.
        asked: What the user gave.
        tensor_parallel_size: Over how many ranks each matrix is cut.

    Raises:
        ConfigError: Those asked for cannot run it, or not on so many ranks.
    """
    from megaft.weights.megatron_folder import MANIFEST

    is_converted = (Path(source) / MANIFEST).is_file()
    backend: Backend = asked or ("megatron" if is_converted else "hugging-face")
    require(
        backend == "megatron" or not is_converted,
        f"--backend is hugging-face, but {source} has megatron's format; drop --backend, "
        "or write it anew with megaft convert --format hugging-face.",
    )
    require(
        backend == "megatron" or tensor_parallel_size == 1,
        f"--tensor-parallel-size is {tensor_parallel_size}, but transformers' matrices are whole; "
        "give --backend megatron.",
    )
    return backend


def require_whole_groups(world_size: int, tensor_parallel_size: int) -> None:
    """Raise ConfigError unless so many ranks make whole tensor-parallel groups."""
    require(
        world_size % tensor_parallel_size == 0,
        f"--tensor-parallel-size is {tensor_parallel_size}, but this runs on {counted(world_size, 'rank')}; "
        "start a multiple of it, "
        f"such as with torchrun --nproc-per-node {tensor_parallel_size}.",
    )
