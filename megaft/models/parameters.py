"""Parameters of a model: their number, their groups for weight decay, and whether they are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from megaft.base import parallel


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings, which are decayed, then biases and norms, which are not.

    Args:
        named_parameters: As `module.named_parameters()` gives them. Frozen ones are left out. Under ZeRO-3 a parameter
            has lost its shape; DeepSpeed keeps it in `ds_shape`.
        weight_decay: Of the first group.

    Returns:
        torch's parameter groups, empty ones left out.
    """
    groups = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    for _, parameter in named_parameters:
        if parameter.requires_grad:
            group = groups[0] if len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 else groups[1]
            group["params"].append(parameter)
    return [group for group in groups if group["params"]]


def is_cut(parameter: Any) -> bool:
    """Return True if the parameter is sharded over tensor-parallel ranks (otherwise it is replicated)."""
    return parallel.tensor_parallel_size() > 1 and getattr(parameter, "tensor_model_parallel", False)


def count(parameters: Iterable[Any]) -> int:
    """Return the number of weights in these parameters of the whole model, however they are cut or partitioned.

    Rows that only fill a vocabulary up to a multiple of the ranks do not count.
    """
    num_weights = 0
    for one in parameters:
        num_parts = parallel.tensor_parallel_size() if is_cut(one) else 1
        num_weights += getattr(one, "ds_numel", one.numel()) * num_parts - getattr(one, "num_filler", 0)
    return num_weights
