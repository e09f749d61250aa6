"""Parameters of a model: parameter count, weight-decay groups and tensor-parallel sharding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from megaft.base import parallel


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Return parameter groups: matrices and embeddings with weight decay, then biases and norms without.

    Args:
        named_parameters: From `module.named_parameters()`; frozen ones are left out. Under ZeRO-3 the shape of a
            parameter is in DeepSpeed's `ds_shape`.
        weight_decay: Weight decay of the first group.

    Returns:
        torch's parameter groups without empty ones.
    """
    groups = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            group = groups[0] if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 else groups[1]
            group["params"].append(parameter)
    return [group for group in groups if group["params"]]


def is_sharded(parameter: Any) -> bool:
    """Return True if the parameter is sharded over tensor-parallel ranks (otherwise it is replicated)."""
    return parallel.tensor_parallel_size() > 1 and getattr(parameter, "tensor_model_parallel", False)


def count(parameters: Iterable[Any]) -> int:
    """Return the number of weights in these parameters of the whole model, however they are sharded or partitioned.

    Rows that pad the vocabulary to a multiple of the tensor-parallel size do not count.
    """
    num_weights = 0
    for parameter in parameters:
        num_shards = parallel.tensor_parallel_size() if is_sharded(parameter) else 1
        numel = getattr(parameter, "ds_numel", parameter.numel())
        num_weights += numel * num_shards - getattr(parameter, "num_padding", 0)
    return num_weights
