"""Weights and optimizer states of a DeepSpeed engine at any ZeRO stage, as named slices of flat fp32 tensors.

Each stage stores the same numbers differently: stage 0 in the parameters, stages 1 and 2 in one flat partition per
parameter group, stage 3 in one per sub-group. A PartitionSlice locates a parameter's slice on this rank, so the same
code saves and loads every stage, and no rank ever gathers the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from megaft.base import parallel
from megaft.models.backend import backend_of_model
from megaft.models.parameters import is_sharded, parameter_groups
from megaft.weights.checkpoint_reader import WEIGHT, shard_name


@dataclass(frozen=True, slots=True)
class PartitionSlice:
    """Location of one parameter's slice in the optimizer's flat partitions."""

    name: str
    offset: int
    """First element of the slice in the flattened parameter."""
    owner: Tensor
    """The tensor that the optimizer steps; its state holds the moments."""
    start: int
    numel: int

    def within(self, tensor: Tensor) -> Float32[Tensor, " numel"]:
        """Return the slice of `tensor`, the owner or one of its moments, as a view."""
        return tensor.detach().view(-1)[self.start : self.start + self.numel]


def partition_slices(engine) -> Iterator[PartitionSlice]:
    """Yield the slice of every trained parameter on this rank, in the order of the model's parameters."""
    locate = {0: _full_slice, 1: _slice_in_group, 2: _slice_in_group, 3: _slice_in_sub_group}[stage(engine)]
    for name, parameter in _trained(engine):
        stored_name = shard_name(name, parallel.tensor_parallel_rank()) if is_sharded(parameter) else name
        local = locate(engine, stored_name, parameter)
        if local is not None and local.numel > 0:
            yield local


def stage(engine) -> int:
    """Return the engine's ZeRO stage."""
    return engine.zero_optimization_stage()


def _full_slice(engine, name: str, parameter: Any) -> PartitionSlice:
    return PartitionSlice(name, 0, parameter, 0, parameter.numel())


def _slice_in_group(engine, name: str, parameter: Any) -> PartitionSlice | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # this rank's partition does not overlap the parameter
        return None
    owner = inner_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    return PartitionSlice(name, mapping.lp_fragment_address.start, owner, address.start, address.numel)


def _slice_in_sub_group(engine, name: str, parameter: Any) -> PartitionSlice:
    zero = engine.optimizer
    sub_group, start, numel = zero.grad_position[zero.get_param_id(parameter)]
    offset = parallel.data_parallel_rank() * numel
    owner = zero.fp32_partitioned_groups_flat[sub_group]
    return PartitionSlice(name, offset, owner, start, min(numel, parameter.ds_numel - offset))  # without padding


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """Return the optimizer inside DeepSpeed's wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def sharding(engine) -> dict[str, Any]:
    """Return the model implementation and tensor-parallel size, as the manifest records them."""
    backend = backend_of_model(getattr(engine.module, "language_model", None))
    return {"backend": backend, "tensor_parallel_size": parallel.tensor_parallel_size()}


def shapes(engine) -> dict[str, list[int]]:
    """Return the shape of every trained parameter, or of a tensor-parallel rank's shard of it."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _trained(engine)}


def collect(engine) -> Iterator[tuple[str, str, int, Tensor]]:
    """Yield (name, kind, offset, values) for this rank to write; over all ranks every slice occurs exactly once."""
    _ensure_moments(engine)
    tensor_rank = parallel.tensor_parallel_rank()
    sharded = {shard_name(name, tensor_rank) for name, parameter in _trained(engine) if is_sharded(parameter)}
    for number, local in enumerate(partition_slices(engine)):
        is_writer = stage(engine) > 0 or number % parallel.data_parallel_size() == parallel.data_parallel_rank()
        if is_writer and (local.name in sharded or tensor_rank == 0):
            for kind, values in _tensors(engine, local):
                yield local.name, kind, local.offset, values


def _trained(engine) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)


def _tensors(engine, local: PartitionSlice) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and each moment of a slice as flat views."""
    yield WEIGHT, local.within(local.owner)
    for kind, moment in inner_optimizer(engine).state[local.owner].items():
        if torch.is_tensor(moment) and kind != "step":
            # Factored optimizers (stage 0 only) have moments whose shapes differ from the parameter's.
            yield kind, local.within(moment) if moment.numel() == local.owner.numel() else moment.view(-1)


def restore(engine, read: Callable[[str, str, int, int], Tensor], optimizer_steps: int) -> None:
    """Overwrite this rank's fp32 weights and moments; `refresh` must follow on all ranks.

    Args:
        engine: An engine of any stage and world size, fresh or between two steps.
        read: `read(name, kind, offset, numel)` returns that slice in fp32.
        optimizer_steps: Steps that the moments include (for Adam's bias correction).
    """
    _ensure_moments(engine)
    for local in partition_slices(engine):
        for kind, values in _tensors(engine, local):
            values.copy_(read(local.name, kind, local.offset, values.numel()))
    _set_optimizer_steps(inner_optimizer(engine), optimizer_steps)


def check_settings(engine, weight_decay: float) -> None:
    """Assert that parameter groups kept their settings and parameters, and that no two states share a step counter.

    This guards against what DeepSpeed's universal checkpoints do at stage 3 (seen in 0.19.8): they merge the groups.
    """
    optimizer = inner_optimizer(engine)
    shared = {key: value for key, value in optimizer.defaults.items() if key not in ("lr", "weight_decay")}
    for group in optimizer.param_groups:
        assert shared.items() <= group.items(), f"a parameter group has {group}, not {shared}"
    for wanted in parameter_groups(engine.module.named_parameters(), weight_decay):
        decays = {optimizer.param_groups[index]["weight_decay"] for index in _group_indices(engine, wanted["params"])}
        assert decays <= {wanted["weight_decay"]}, f"groups decay by {decays}, not by {wanted['weight_decay']}"
    steps = [state["step"].data_ptr() for state in optimizer.state.values() if torch.is_tensor(state.get("step"))]
    assert len(set(steps)) == len(steps), "two states share a step"


def _group_indices(engine, parameters: list[Any]) -> set[int]:
    """Return the indices of the optimizer groups that hold these parameters on this rank."""
    zero = engine.optimizer
    if stage(engine) == 3:
        sub_groups = {zero.grad_position[zero.get_param_id(parameter)][0] for parameter in parameters}
        return {zero.sub_group_to_group_id[sub_group] for sub_group in sub_groups}
    if stage(engine) > 0:
        mappings = [parameter._hp_mapping for parameter in parameters]
        return {mapping.param_group_index for mapping in mappings if mapping is not None}
    ids = {id(parameter) for parameter in parameters}
    groups = inner_optimizer(engine).param_groups
    return {index for index, group in enumerate(groups) if not ids.isdisjoint(map(id, group["params"]))}


def _ensure_moments(engine) -> None:
    """Make the optimizer create its moments by a step with zero gradients, learning rate and weight decay."""
    optimizer = inner_optimizer(engine)
    owners = list({id(local.owner): local.owner for local in partition_slices(engine)}.values())
    if all(optimizer.state.get(owner) for owner in owners):
        return
    before = [{name: group[name] for name in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group |= {"params": [], "lr": 0.0, "weight_decay": 0.0}  # SGD adds weight decay to its momentum
    optimizer.param_groups[0]["params"] = owners
    saved_grads = [owner.grad for owner in owners]
    for owner in owners:
        owner.grad = torch.zeros_like(owner)
    optimizer.step()
    for owner, grad in zip(owners, saved_grads, strict=True):
        owner.grad = grad
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group.update(settings)
    _set_optimizer_steps(optimizer, 0)


def _set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], float(steps))  # a new tensor, so none is shared
    for group in optimizer.param_groups:
        if "step" in group:  # apex counts steps in the group
            group["step"] = steps


def set_steps(engine, steps: int, skipped_steps: int) -> None:
    """Set the engine's step counts.

    Args:
        engine: The engine.
        steps: Optimizer steps attempted.
        skipped_steps: Steps whose update DeepSpeed (non-finite gradient, such as an fp16 overflow) or the guard's
            `skip` discarded.
    """
    engine.global_steps, engine.skipped_steps = steps, skipped_steps


def refresh(engine) -> None:
    """Copy the fp32 weights into the weights of the forward pass, on all ranks together."""
    zero = engine.optimizer
    if stage(engine) in (1, 2):
        zero.update_lp_params()
    elif stage(engine) == 3:
        zero._partition_all_parameters()  # parameters that stay gathered between steps have the old weights
        for compute, master, partitions in zip(
            zero.fp16_partitioned_groups_flat,
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            compute.data.copy_(master.data)
            for partition, values in zip(partitions, zero.unflatten(compute, partitions), strict=True):
                partition.data = values.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def step(engine, accepts: Callable[[float], bool] | None = None) -> float | Tensor | None:
    """Take the engine's step; return the norm of the global batch's gradient before clipping.

    Returns None before the last micro-batch of a step, because the engine then only advances its micro-batch counter.
    At stage 0 DeepSpeed does not report the norm, so it is computed from the full gradients before the step.

    Args:
        engine: The engine, after its backward pass.
        accepts: Called with the norm before the update; if it returns False, the update is discarded and the step
            counts as skipped.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    full_norm = _norm(engine) if stage(engine) == 0 else None

    def norm() -> Any:
        return _agreed(engine.optimizer._global_grad_norm if full_norm is None else full_norm)

    if accepts is None:
        engine.step()
    else:
        _step_if(engine, cache(lambda: accepts(float(norm()))))
    return norm()


def _norm(engine) -> Tensor:
    """Return the norm of the gradient at stage 0; replicated parameters count on one tensor-parallel rank only."""
    counts_replicated = parallel.tensor_parallel_rank() == 0
    counted = [parameter for _, parameter in _trained(engine) if counts_replicated or is_sharded(parameter)]
    gradients = [parameter.grad for parameter in counted if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm if parallel.tensor_parallel_size() == 1 else parallel.sum_over_tensor_ranks(norm.square()).sqrt()


def _agreed(norm: float | Tensor | None) -> float | Tensor | None:
    """Return the main rank's norm, so that all ranks decide alike: tensor-parallel groups may sum in other orders."""
    if norm is None or parallel.tensor_parallel_size() == 1:
        return norm
    return parallel.broadcast_from_main(torch.as_tensor(norm))


def _step_if(engine, accepts: Callable[[], bool]) -> None:
    """Take the engine's step, updating weights only if `accepts()`; under ZeRO the optimizer steps once per group."""
    optimizer = inner_optimizer(engine)
    original_step = optimizer.step
    vars(optimizer)["step"] = lambda *args, **kwargs: original_step(*args, **kwargs) if accepts() else None
    skipped_before = engine.skipped_steps
    try:
        engine.step()
    finally:
        del vars(optimizer)["step"]
    if engine.skipped_steps == skipped_before and not accepts():
        engine.skipped_steps += 1


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine) -> dict[str, float | int]:
    """Return the fp16 loss scaler's state; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        field: getattr(scaler, field) for field in SCALER_FIELDS if engine.fp16_enabled() and hasattr(scaler, field)
    }


def set_loss_scale_state(engine, state: dict[str, float | int]) -> None:
    """Restore the state that `loss_scale_state` returned."""
    for field, value in state.items():
        setattr(engine.optimizer.loss_scaler, field, value)


def smallest_loss_scale(engine) -> float | None:
    """Return the smallest fp16 loss scale, 0 if the scale is constant; None in other precisions."""
    return getattr(engine.optimizer.loss_scaler, "min_scale", 0) if engine.fp16_enabled() else None
