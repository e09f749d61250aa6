"""Tensor-parallel and data-parallel groups through the methods of DeepSpeed's and Megatron-LM's `mpu`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParallelUnit:
    """Ranks, sizes and process groups of tensor and data parallelism, as DeepSpeed's `mpu`."""

    tensor_rank: int
    tensor_size: int
    tensor_group: Any
    data_rank: int
    data_size: int
    data_group: Any

    def get_model_parallel_rank(self) -> int:
        """Return the tensor-parallel rank."""
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        """Return the tensor-parallel size."""
        return self.tensor_size

    def get_model_parallel_group(self) -> Any:
        """Return the process group of the ranks that shard each matrix."""
        return self.tensor_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Return the data-parallel rank."""
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Return the data-parallel size."""
        return self.data_size

    def get_data_parallel_group(self) -> Any:
        """Return the process group of the ranks over which ZeRO partitions."""
        return self.data_group
