"""Context length and stride of a protocol for a model, as named and as the engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evaluate_zero_shot.protocols import Protocol
from megaft.base.checks import require
from megaft.scoring.windows import Window, windows


@dataclass(frozen=True, slots=True)
class Geometry:
    """A protocol's windows."""

    protocol: Protocol
    context_length: int
    """Context length as the protocol counts it."""
    stride: int
    is_own: bool
    """True if both are the protocol's own, or left to the model by it."""

    @property
    def num_inputs(self) -> int:
        """Input tokens of a full window: its last token may be a target only."""
        return self.context_length - (self.protocol.window == "tokens")

    def windows(self, num_tokens: int) -> Iterator[Window]:
        """Cut a document."""
        return windows(num_tokens, self.num_inputs, self.stride, first=self.protocol.first, last=self.protocol.last)


def geometry(protocol: Protocol, context_limit: int | None, context_length: int | None, stride: int | None) -> Geometry:
    """Resolve a protocol's windows for a model.

    Args:
        protocol: Whose windows.
        context_limit: Positions that the model has; None: no limit.
        context_length: What the user asks for instead of the protocol's.
        stride: Likewise.

    Raises:
        ConfigError: The model has too few positions, or the stride is too large.
    """
    wanted = context_length or protocol.context_length or context_limit
    require(wanted is not None, "the model has no limit to its context; give --context-length, for example 1024.")
    assert wanted is not None
    own = protocol.context_length or context_limit
    own_stride = _stride(protocol, wanted)
    found = Geometry(protocol, wanted, stride or own_stride, wanted == own and stride in (None, own_stride))
    largest = wanted - (protocol.window == "tokens" and protocol.last == "extended")
    require(
        1 <= found.stride <= largest,
        f"--stride is {found.stride}; use 1 to {largest} with protocol {protocol.name} at a context length of "
        f"{wanted}.",
    )
    require(
        context_limit is None or found.num_inputs <= context_limit,
        f"protocol {protocol.name} has a context length of {wanted}, but the model has {context_limit} positions; "
        f"give --context-length {context_limit} and, if need be, a smaller --stride; the report will say so.",
    )
    require(found.num_inputs >= 1, f"--context-length is {wanted}; use 2 or more with protocol {protocol.name}.")
    return found


def _stride(protocol: Protocol, context_length: int) -> int:
    if isinstance(protocol.stride, int):
        return protocol.stride
    if protocol.stride == "half":
        return max(1, context_length // 2)
    # Where a window has one input less, and reaches back to score every token, so has its stride.
    return context_length - (protocol.window == "tokens" and protocol.last == "extended")
