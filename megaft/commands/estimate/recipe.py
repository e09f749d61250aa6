"""Sizes and settings of a training run, and the memory of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megaft.base.checks import require
from megaft.commands.estimate.memory import Activations, MicroBatch, States, activations, element_bytes, phases, states
from megaft.config.deepspeed_json import ResolvedSettings
from megaft.config.parallelism import num_data_ranks, require_shardable
from megaft.config.train import OptimConfig
from megaft.run.settings import plan_engine
from megaft.weights.dimensions import Dimensions


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Model, batch and parallelism of a run, which determine its memory and speed."""

    dims: Dimensions
    deepspeed: dict[str, Any]
    """The DeepSpeed JSON as read."""
    context_length: int
    world_size: int = 1
    tensor_parallel_size: int = 1
    is_megatron: bool = False
    is_recomputed: bool = False
    optim: OptimConfig

    def __post_init__(self) -> None:
        size, dims = self.tensor_parallel_size, self.dims
        num_data_ranks(self.world_size, size, "--tensor-parallel-size")
        require_shardable("megatron" if self.is_megatron else "hugging-face", size)
        dims.require_shardable(size, "--tensor-parallel-size")
        require(
            self.context_length <= dims.num_positions,
            f"--context-length is {self.context_length}, but the model has {dims.num_positions} positions; "
            f"use {dims.num_positions} or less.",
        )

    @property
    def num_data_ranks(self) -> int:
        """Data-parallel size: ranks, or tensor-parallel groups, that train on different samples."""
        return num_data_ranks(self.world_size, self.tensor_parallel_size, "--tensor-parallel-size")

    def setup(self) -> ResolvedSettings:
        """Return the DeepSpeed JSON resolved for these ranks.

        Raises:
            ConfigError: Training would refuse the settings.
        """
        return plan_engine(
            self.deepspeed,
            world_size=self.world_size,
            tensor_parallel_size=self.tensor_parallel_size,
            is_megatron=self.is_megatron,
            optim=self.optim,
            has_cuda=True,
        )

    def work(self, setup: ResolvedSettings) -> MicroBatch:
        """Return the micro-batch of one rank."""
        return MicroBatch(
            dims=self.dims,
            micro_batch_size=setup.micro_batch_size,
            context_length=self.context_length,
            tensor_parallel_size=self.tensor_parallel_size,
            is_megatron=self.is_megatron,
            is_recomputed=self.is_recomputed,
            element_bytes=element_bytes(setup),
        )

    def footprint(self, rank: int | None = None) -> Footprint:
        """Return the memory of a data-parallel rank; by default of the one with the most."""
        setup = self.setup()
        work = self.work(setup)
        matrices = self.dims.matrices_in_order(self.tensor_parallel_size, self.is_megatron)
        layer = () if self.is_megatron else tuple(out * width for out, width in self.dims.matrices_of_layer())
        held = states(work.weights, setup, self.num_data_ranks, matrices, rank, layer)
        passing = activations(work)
        return Footprint(setup, held, passing, phases(held, passing))


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory of one rank, in bytes."""

    setup: ResolvedSettings
    states: States
    activations: Activations
    phases: dict[str, dict[str, int]]
    """Bytes by component in each phase of a step that can have the peak."""

    @property
    def peak_phase(self) -> str:
        """Name of the phase with the peak memory."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak_bytes(self) -> int:
        """Peak memory in bytes."""
        return sum(self.phases[self.peak_phase].values())
