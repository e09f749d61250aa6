"""What a DeepSpeed engine has learned, as named pieces of flat fp32 tensors, whatever its ZeRO stage.

Every stage keeps the same numbers in another place: stage 0 in the parameters, stages 1 and 2 in one flat partition a
parameter group, stage 3 in one a sub-group. A Place says where a piece of a parameter lies on this rank, so that
saving and loading are the same few lines for all of them, and no rank ever gathers a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from megaft import parallel

WEIGHT = "weight"
"""The kind of the fp32 weight itself; the other kinds are the optimizer's names of its moments."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece of one parameter lies in the optimizer's tensors."""

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
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            place = locate(engine, name, parameter)
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


def shapes(engine) -> dict[str, list[int]]:
    """Return the full shape of every trained parameter."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def collect(engine) -> Iterator[tuple[str, str, int, Tensor]]:
    """Yield (name, kind, offset, values) of what this rank has to write: every piece exactly once over all ranks."""
    is_replicated = stage(engine) == 0
    for number, place in enumerate(places(engine)):
        is_ours = number % parallel.data_parallel_size() == parallel.data_parallel_rank()
        if is_ours or not is_replicated:
            for kind, values in _tensors(engine, place):
                yield place.name, kind, place.offset, values


def _tensors(engine, place: Place) -> Iterator[tuple[str, Tensor]]:
    """Yield the weight and each moment of a place as flat views."""
    yield WEIGHT, place.within(place.owner)
    for kind, moment in inner_optimizer(engine).state[place.owner].items():
        if torch.is_tensor(moment) and kind != "step":
            # Adafactor, at stage 0 only, has moments of other shapes than the parameter's.
            yield kind, place.within(moment) if moment.numel() == place.owner.numel() else moment.view(-1)


def restore(engine, read, optimizer_steps: int) -> None:
    """Overwrite weights and moments on this rank.

    Args:
        engine: A fresh engine of any stage and world size.
        read: `read(name, kind, offset, numel)` returns that piece as fp32.
        optimizer_steps: Steps the moments have seen (Adam's bias correction).
    """
    _make_moments(engine)
    for place in places(engine):
        for kind, values in _tensors(engine, place):
            values.copy_(read(place.name, kind, place.offset, values.numel()))
    _set_optimizer_steps(inner_optimizer(engine), optimizer_steps)
    _refresh_compute_weights(engine)


def _make_moments(engine) -> None:
    """Let a fresh optimizer create its moments by one step of zero gradients at learning rate zero."""
    optimizer = inner_optimizer(engine)
    owners = list({id(place.owner): place.owner for place in places(engine)}.values())
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


def _set_optimizer_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], float(steps))  # a tensor each: none is shared
    for group in optimizer.param_groups:
        if "step" in group:  # apex counts in the group
            group["step"] = steps


def _refresh_compute_weights(engine) -> None:
    """Copy the fp32 weights into those the forward pass uses."""
    zero = engine.optimizer
    if stage(engine) in (1, 2):
        zero.update_lp_params()
    elif stage(engine) == 3:
        for compute, master, parts in zip(
            zero.fp16_partitioned_groups_flat,
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            compute.data.copy_(master.data)
            for part, values in zip(parts, zero.unflatten(compute, parts), strict=True):
                part.data = values.data


def step(engine) -> float | Tensor | None:
    """Take the engine's step; return the norm of the whole batch's gradient before clipping.

    On any but the last micro batch of a step the engine only counts, and what is returned has no meaning. At stage 0
    DeepSpeed tells no norm, but the gradients are whole and still there before its step.
    """
    norm = None
    if stage(engine) == 0 and engine.is_gradient_accumulation_boundary():
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


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
