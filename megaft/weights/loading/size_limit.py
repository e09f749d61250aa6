"""Stop building a model whose config.json makes it far larger than its weight files or the host's memory.

transformers builds all modules before comparing them with the weights: a wrong number of layers costs minutes, a wrong
width all of the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as registration

from megaft.base.errors import DataError
from megaft.base.host_memory import available_memory

TENSORS_FACTOR, TENSORS_SLACK = 100, 1_000
"""Allowed parameters: factor x stored tensors + slack. The experts of a layer may be stored as one tensor."""
ELEMENTS_FACTOR, ELEMENTS_SLACK = 4, 100_000_000
"""Allowed elements: factor x stored elements + slack. Tied embeddings are built twice."""
FP32_BYTES = 4
SMALL_BYTES = 2**30
"""Do not check free memory for buffers up to this many bytes."""


class Size(NamedTuple):
    """Size of a model or of its weight files."""

    tensors: int
    elements: int
    """Total elements of all tensors."""


class MemoryBudget(NamedTuple):
    """Free bytes of a host's memory, and the number of ranks on it that build a model."""

    free: int
    ranks: int = 1


@dataclass(slots=True)
class _Built:
    """Counts parameters and buffers registered with modules, each name of a module once."""

    tensors: int = 0
    elements: int = 0
    buffer_bytes: int = 0

    def add_parameter(self, owner: nn.Module, name: str, parameter: Any) -> None:
        if owner._parameters.get(name) is None:
            self.tensors += 1
            self.elements += parameter.numel()

    def add_buffer(self, owner: nn.Module, name: str, buffer: Any) -> None:
        if buffer is not None and owner._buffers.get(name) is None:
            self.buffer_bytes += buffer.nbytes


@contextmanager
def no_larger_than(stored: Size, model: str) -> Iterator[None]:
    """Stop building a model that becomes far larger than its weight files.

    Small differences pass; the later comparison of all tensors finds them.

    Args:
        stored: Size of the weight files.
        model: Setting and value for the message, such as "--model.path is DIR".

    Raises:
        DataError: The model has far more parameters, or its buffers exceed this host's free memory.
    """
    limit = Size(TENSORS_FACTOR * stored.tensors + TENSORS_SLACK, ELEMENTS_FACTOR * stored.elements + ELEMENTS_SLACK)

    def check(built: _Built) -> None:
        if built.tensors > limit.tensors or built.elements > limit.elements:
            raise DataError(
                f"{model}; its weights do not fit its config.json, which describes more than "
                f"{built.elements:,} weights in {built.tensors:,} tensors, but {stored.elements:,} in "
                f"{stored.tensors:,} are stored. Copy both from one model."
            )
        if built.buffer_bytes > SMALL_BYTES:
            _require_memory(model, built.buffer_bytes, MemoryBudget(available_memory()))

    with _counting(check):
        yield


@contextmanager
def no_larger_than_memory(model: str, parts: int = 1, budget: MemoryBudget | None = None) -> Iterator[None]:
    """Stop building a new fp32 model that this host's free memory cannot hold.

    Args:
        model: Setting and value for the message, such as "--model.from-scratch is DIR".
        parts: Number of ZeRO-3 partitions, one per rank.
        budget: Defaults to this host's, for one rank. Ranks that build a model together must share one budget, so that
            either all or none refuse it.

    Raises:
        DataError: Its parameters and buffers exceed the budget.
    """
    limit = budget or MemoryBudget(available_memory())

    def check(built: _Built) -> None:
        _require_memory(model, FP32_BYTES * built.elements // parts + built.buffer_bytes, limit)

    with _counting(check):
        yield


def _require_memory(model: str, num_bytes: int, budget: MemoryBudget) -> None:
    total = num_bytes * budget.ranks
    if total > budget.free:
        ranks = f" ({num_bytes:,} on each of its {budget.ranks} ranks)" if budget.ranks > 1 else ""
        raise DataError(
            f"{model}; its config.json describes a model that takes more than {total:,} bytes of memory{ranks}, but "
            f"{budget.free:,} are free on this host. Correct its sizes, or use a host with more memory"
            f"{' or ZeRO stage 3' if budget.ranks > 1 else ''}."
        )


@contextmanager
def _counting(check: Callable[[_Built], None]) -> Iterator[None]:
    built = _Built()

    def then_check(add: Callable[[nn.Module, str, Any], None]) -> Callable[[nn.Module, str, Any], None]:
        def hook(owner: nn.Module, name: str, tensor: Any) -> None:
            add(owner, name, tensor)
            check(built)

        return hook

    handles = (
        registration.register_module_parameter_registration_hook(then_check(built.add_parameter)),
        registration.register_module_buffer_registration_hook(then_check(built.add_buffer)),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
