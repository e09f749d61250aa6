"""Search for the least invasive changes of settings that make a run fit into GPU memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megaft.base.errors import ConfigError
from megaft.commands.estimate.recipe import Footprint, Recipe
from megaft.config.deepspeed_keys import ACCUMULATION, GLOBAL_BATCH, MICRO_BATCH

MAX_SHOWN = 3
MAX_TIMES_RANKS = 64
"""Largest multiple of the given number of ranks that is tried."""
MAX_TENSOR_PARALLEL_SIZE = 8
"""Largest tensor-parallel size that is tried."""


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that together make a run fit."""

    settings: tuple[str, ...]
    peak_bytes: int
    offloaded_bytes: int
    """Offloaded bytes of host memory per rank; the host needs them for each of its GPUs."""


@dataclass(frozen=True, slots=True)
class Option:
    """One value of one kind of setting."""

    level: int
    """Distance from the given value, which is level 0; higher levels change more."""
    text: str
    recipe: dict[str, Any]
    """Fields of the recipe that change."""
    deepspeed: dict[str, Any]
    """Keys of the DeepSpeed JSON that change, with dots between levels."""


def changes(given: Recipe, available_bytes: int) -> list[Change]:
    """Return up to MAX_SHOWN changes that make a run fit; none contains all the kinds of another.

    Kinds, from the least invasive: a smaller micro-batch (more accumulation, the same step), activation checkpointing
    (more work), a higher ZeRO stage (more traffic), offloading (slow), tensor parallelism (another backend), more
    ranks. A change of one kind outweighs all earlier kinds together.
    """
    fitting: list[tuple[set[int], Change]] = []
    for options in sorted(product(*_kinds(given)), key=_invasiveness):
        kinds = {kind for kind, option in enumerate(options) if option.level}
        if any(fewer_kinds <= kinds for fewer_kinds, _ in fitting):
            continue
        footprint = _footprint(given, options)
        if footprint is not None and footprint.peak_bytes <= available_bytes:
            settings = tuple(option.text for option in options if option.level)
            fitting.append((kinds, Change(settings, footprint.peak_bytes, footprint.states.host)))
            if len(fitting) == MAX_SHOWN:
                break
    return [change for _, change in fitting]


def _invasiveness(options: tuple[Option, ...]) -> tuple[int, ...]:
    return tuple(option.level for option in reversed(options))


def _footprint(given: Recipe, options: tuple[Option, ...]) -> Footprint | None:
    """Return the memory with these options; None if they cannot be combined."""
    settings, fields = copy.deepcopy(given.deepspeed), {}
    for option in options:
        fields |= option.recipe
        for path, value in option.deepspeed.items():
            _put(settings, path, value)
    try:
        return replace(given, deepspeed=settings, **fields).footprint()
    except ConfigError:
        return None


def _put(settings: dict[str, Any], path: str, value: Any) -> None:
    *blocks, key = path.split(".")
    for name in blocks:
        settings = settings.setdefault(name, {})
    settings[key] = value


def _kinds(given: Recipe) -> Iterator[list[Option]]:
    setup = given.setup()
    same_batch = {GLOBAL_BATCH: setup.global_batch_size, ACCUMULATION: "auto"}
    sizes = [setup.micro_batch_size >> times for times in range(setup.micro_batch_size.bit_length())]
    yield [
        Option(level, f"{MICRO_BATCH} {size}", {}, {**same_batch, MICRO_BATCH: size})
        for level, size in enumerate(sizes)
    ]
    yield [
        Option(level, "--model.activation-checkpointing", {"is_recomputed": True} if level else {}, {})
        for level in range(1 if given.is_recomputed else 2)
    ]
    stage = setup.zero_stage
    yield [
        Option(level, f"zero_optimization.stage {stage + level}", {}, {"zero_optimization.stage": stage + level})
        for level in range(4 - stage)
    ]
    yield list(_offloads(setup.offload_optimizer))
    yield list(_tensor_sizes(given))
    yield [
        Option(level, f"{given.world_size << level} ranks", {"world_size": given.world_size << level}, {})
        for level in range(MAX_TIMES_RANKS.bit_length())
    ]


def _offloads(is_offloaded: bool) -> Iterator[Option]:
    optimizer_on_cpu = {"zero_optimization.offload_optimizer.device": "cpu"}
    yield Option(0, "", {}, {})
    if not is_offloaded:
        yield Option(1, "zero_optimization.offload_optimizer.device cpu", {}, optimizer_on_cpu)
    both = optimizer_on_cpu | {"zero_optimization.offload_param.device": "cpu"}
    yield Option(2, "zero_optimization.offload_optimizer.device and offload_param.device cpu", {}, both)


def _tensor_sizes(given: Recipe) -> Iterator[Option]:
    yield Option(0, "", {}, {})
    size, level = given.tensor_parallel_size * 2, 1
    while size <= MAX_TENSOR_PARALLEL_SIZE:
        text = f"--model.backend megatron --parallel.tensor-parallel-size {size}"
        yield Option(level, text, {"tensor_parallel_size": size, "is_megatron": True}, {})
        size, level = size * 2, level + 1
