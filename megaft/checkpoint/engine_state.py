"""Weights and optimizer states of a DeepSpeed engine at any ZeRO stage, as named pieces of flat fp32 tensors.

Every stage keeps the same numbers in another place: stage 0 in the parameters, stages 1 and 2 in one flat partition a
parameter group, stage 3 in one a sub-group. A Place says where a piece of a parameter lies on this rank, so that
saving and loading are the same few lines for all of them, and no rank ever gathers a whole model.
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
from megaft.models.parameters import is_cut, parameter_groups
from megaft.weights.checkpoint_reader import WEIGHT, shard_name


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a piece of one parameter in the optimizer's flat tensors."""

    name: str
    offset: int
    """First element of the piece in the flattened parameter."""
    owner: Tensor
    """The tensor the optimizer steps; its state holds the moments."""
    start: int
    numel: int

    def within(self, tensor: Tensor) -> Float32[Tensor, " numel"]:
        """Return the piece of `tensor`, the owner or one of its moments, as a view."""
        return tensor.detach().view(-1)[self.start : self.start + self.numel]


def places(engine) -> Iterator[Place]:
    """Yield every trained piece this rank holds, in the order of the model's parameters."""
    locate = {0: _place_whole, 1: _place_in_group, 2: _place_in_group, 3: _place_in_sub_group}[stage(engine)]
    for name, parameter in _trained(engine):
        stored = shard_name(name, parallel.tensor_parallel_rank()) if is_cut(parameter) else name
        place = locate(engine, stored, parameter)
        if place is not None and place.numel > 0:
            yield place


def stage(engine) -> int:
    """Return the engine's ZeRO stage."""
    return engine.zero_optimization_stage()


def _place_whole(engine, name: str, parameter: Any) -> Place:
    return Place(name, 0, parameter, 0, parameter.numel())


def _place_in_group(engine, name: str, parameter: Any) -> Place | None:
    mapping = parameter._hp_mapping
    if mapping is None:  # this rank's partition has nothing of it
        return None
    owner = inner_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
    address = mapping.hp_fragment_address
    return Place(name, mapping.lp_fragment_address.start, owner, address.start, address.numel)


def _place_in_sub_group(engine, name: str, parameter: Any) -> Place:
    zero = engine.optimizer
    sub_group, start, numel = zero.grad_position[zero.get_param_id(parameter)]
    offset = parallel.data_parallel_rank() * numel
    # The last rank's partition is padded.
    return Place(
        name, offset, zero.fp32_partitioned_groups_flat[sub_group], start, min(numel, parameter.ds_numel - offset)
    )


def inner_optimizer(engine) -> torch.optim.Optimizer:
    """Return the optimizer that steps, inside whatever DeepSpeed wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def cut(engine) -> dict[str, Any]:
    """Return the backend and tensor-parallel size of the parameters."""
    backend = backend_of_model(getattr(engine.module, "language_model", None))
    return {"backend": backend, "tensor_parallel_size": parallel.tensor_parallel_size()}


def shapes(engine) -> dict[str, list[int]]:
    """Return the shape of every trained parameter, or of a tensor-parallel rank's part of it."""
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in _trained(engine)}


def collect(engine) -> Iterator[tuple[str, str, int, Tensor]]:
    """Yield (name, kind, offset, values) of what this rank has to write: every piece exactly once over all ranks."""
    _ensure_moments(engine)
    parts = {shard_name(name, parallel.tensor_parallel_rank()) for name, one in _trained(engine) if is_cut(one)}
    for number, place in enumerate(places(engine)):
        is_ours = stage(engine) > 0 or number % parallel.data_parallel_size() == parallel.data_parallel_rank()
        if is_ours and (place.name in parts or parallel.tensor_parallel_rank() == 0):
            for kind, values in _tensors(engine, place):
                yield place.name, kind, place.offset, values


def _trained(engine) -> Iterator[tuple[str, Any]]:
    return ((name, one) for name, one in engine.module.named_parameters() if one.requires_grad)


def _tensors(engine, place: Place) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and each moment of a place as flat views."""
    yield WEIGHT, place.within(place.owner)
    for kind, moment in inner_optimizer(engine).state[place.owner].items():
        if torch.is_tensor(moment) and kind != "step":
            # Optimizers of whole matrices, at stage 0 only, have moments of other shapes than the parameter's.
            yield kind, place.within(moment) if moment.numel() == place.owner.numel() else moment.view(-1)


def restore(engine, read: Callable[[str, str, int, int], Tensor], optimizer_steps: int) -> None:
    """Overwrite this rank's fp32 weights and moments; `refresh` must follow on all ranks.

    Args:
        engine: An engine of any stage and world size, fresh or between two steps.
        read: `read(name, kind, offset, numel)` returns that piece as fp32.
        optimizer_steps: Steps the moments have seen (Adam's bias correction).
    """
    _ensure_moments(engine)
    for place in places(engine):
        for kind, values in _tensors(engine, place):
            values.copy_(read(place.name, kind, place.offset, values.numel()))
    _set_optimizer_steps(inner_optimizer(engine), optimizer_steps)


def check_settings(engine, weight_decay: float) -> None:
    """Assert that every group steps as it was built to, every parameter in its own, and that no states share a step.

    DeepSpeed's own universal checkpoints merge groups at stage 3 (seen in 0.19.8).
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
    """Return the optimizer groups of those parameters that this rank has a part of."""
    zero = engine.optimizer
    if stage(engine) == 3:
        return {zero.sub_group_to_group_id[zero.grad_position[zero.get_param_id(one)][0]] for one in parameters}
    if stage(engine) > 0:
        return {one._hp_mapping.param_group_index for one in parameters if one._hp_mapping is not None}
    ids = {id(one) for one in parameters}
    groups = inner_optimizer(engine).param_groups
    return {index for index, group in enumerate(groups) if not ids.isdisjoint(map(id, group["params"]))}


def _ensure_moments(engine) -> None:
    """Make an optimizer create its moments, by a step of zero gradients at learning rate zero."""
    optimizer = inner_optimizer(engine)
    owners = list({id(place.owner): place.owner for place in places(engine)}.values())
    if all(optimizer.state.get(owner) for owner in owners):
        return
    before = [(group["params"], group["lr"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"], group["lr"] = [], 0.0
    optimizer.param_groups[0]["params"] = owners
    kept = [owner.grad for owner in owners]
    for owner in owners:
        owner.grad = torch.zeros_like(owner)
    optimizer.step()
    for owner, grad in zip(owners, kept, strict=True):
        owner.grad = grad
    for group, (parameters, rate) in zip(optimizer.param_groups, before, strict=True):
        group["params"], group["lr"] = parameters, rate
    _set_optimizer_steps(optimizer, 0)


def _set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], float(steps))  # a tensor each: none is shared
    for group in optimizer.param_groups:
        if "step" in group:  # apex counts in the group
            group["step"] = steps


def set_steps(engine, steps: int, skipped_steps: int) -> None:
    """Set the engine's own counts of steps tried and of those skipped."""
    engine.global_steps, engine.skipped_steps = steps, skipped_steps


def refresh(engine) -> None:
    """Copy the fp32 weights into those the forward pass uses, on all ranks together."""
    zero = engine.optimizer
    if stage(engine) in (1, 2):
        zero.update_lp_params()
    elif stage(engine) == 3:
        zero._partition_all_parameters()  # what was gathered, and stays so between steps, has the old weights
        for compute, master, parts in zip(
            zero.fp16_partitioned_groups_flat,
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            compute.data.copy_(master.data)
            for part, values in zip(parts, zero.unflatten(compute, parts), strict=True):
                part.data = values.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def step(engine, is_wanted: Callable[[float], bool] | None = None) -> float | Tensor | None:
    """Take the engine's step; return the norm of the whole batch's gradient before clipping.

    On any but the last micro batch of a step the engine only counts, and there is none. At stage 0 DeepSpeed tells no
    norm, but the gradients are whole and still there before its step.

    Args:
        engine: The engine, after its backward pass.
        is_wanted: Asked with the norm before weights move; where it says no they stay, and the step counts as skipped.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    whole = _norm(engine) if stage(engine) == 0 else None

    def norm() -> Any:
        return _agreed(engine.optimizer._global_grad_norm if whole is None else whole)

    if is_wanted is None:
        engine.step()
    else:
        _step_if(engine, cache(lambda: is_wanted(float(norm()))))
    return norm()


def _norm(engine) -> Tensor:
    """Return the norm of the gradient at stage 0, each part of a cut parameter counted once."""
    counts_all = parallel.tensor_parallel_rank() == 0
    gradients = [one.grad for _, one in _trained(engine) if one.grad is not None and (counts_all or is_cut(one))]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm if parallel.tensor_parallel_size() == 1 else parallel.sum_over_tensor_ranks(norm.square()).sqrt()


def _agreed(norm: float | Tensor | None) -> float | Tensor | None:
    """Return the main rank's norm: models may add their parts up in other orders, and all ranks must decide alike."""
    if norm is None or parallel.tensor_parallel_size() == 1:
        return norm
    return parallel.from_main(torch.as_tensor(norm))


def _step_if(engine, is_wanted: Callable[[], bool]) -> None:
    """Take the engine's step with an optimizer that asks first; under ZeRO it steps once a group of parameters."""
    optimizer = inner_optimizer(engine)
    really_step = optimizer.step
    vars(optimizer)["step"] = lambda *args, **kwargs: really_step(*args, **kwargs) if is_wanted() else None
    skipped_before = engine.skipped_steps
    try:
        engine.step()
    finally:
        del vars(optimizer)["step"]
    if engine.skipped_steps == skipped_before and not is_wanted():
        engine.skipped_steps += 1


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine) -> dict[str, float | int]:
    """Return the fp16 loss scaler's state; empty in other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {
        field: getattr(scaler, field) for field in SCALER_FIELDS if engine.fp16_enabled() and hasattr(scaler, field)
    }


def set_loss_scale_state(engine, state: dict[str, float | int]) -> None:
    """Put back what `loss_scale_state` returned."""
    for field, value in state.items():
        setattr(engine.optimizer.loss_scaler, field, value)


def keep_loss_scale_at_floor(engine) -> None:
    """Let an overflow at the smallest loss scale be one more skipped step: the guard ends the run, with a message."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False


def smallest_loss_scale(engine) -> float | None:
    """Return the least fp16 loss scale, 0 if the scale is constant; None in other precisions."""
    return getattr(engine.optimizer.loss_scaler, "min_scale", 0) if engine.fp16_enabled() else None
