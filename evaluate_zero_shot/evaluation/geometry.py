"""Window geometry: a protocol's context length and stride, resolved for a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evaluate_zero_shot.protocols import Protocol
from megaft.base.checks import require
from megaft.scoring.windows import Window, windows


@dataclass(frozen=True, slots=True)
class Geometry:
    """Context length and stride of one evaluation."""

    protocol: Protocol
    context_length: int
    """Tokens of a window, as the protocol counts them."""
    stride: int
    is_default: bool
    """True if both are the protocol's defaults."""

    @property
    def num_inputs(self) -> int:
        """Input tokens of a full window; its last token may be only a target."""
        return self.context_length - (self.protocol.window == "tokens")

    def windows(self, num_tokens: int) -> Iterator[Window]:
        """Return the windows of a document."""
        return windows(num_tokens, self.num_inputs, self.stride, first=self.protocol.first, last=self.protocol.last)


def resolve_geometry(
    protocol: Protocol, context_limit: int | None, context_length: int | None, stride: int | None
) -> Geometry:
    """Return the windows of a protocol for a model.

    Args:
        protocol: Protocol, whose defaults apply.
        context_limit: Number of the model's positions; None: no limit.
        context_length: The user's choice instead of the default.
        stride: The user's choice instead of the default.

    Raises:
        ConfigError: The model has too few positions, or the stride is too large.
    """
    wanted = context_length or protocol.context_length or context_limit
    require(
        wanted is not None,
        "--context-length is not given, and neither protocol nor model limits the context; give it, for example 1024.",
    )
    assert wanted is not None
    default = protocol.context_length or context_limit
    default_stride = _stride(protocol, wanted)
    resolved = Geometry(
        protocol, wanted, stride or default_stride, wanted == default and stride in (None, default_stride)
    )
    largest = wanted - (protocol.window == "tokens" and protocol.last == "extended")
    require(
        1 <= resolved.stride <= largest,
        f"--stride is {resolved.stride}; use 1 to {largest} with --protocol {protocol.name} at a context length of "
        f"{wanted}.",
    )
    require(
        context_limit is None or resolved.num_inputs <= context_limit,
        f"--protocol {protocol.name} has a context length of {wanted}, but the model has {context_limit} positions; "
        f"use --context-length {context_limit} and, if necessary, a smaller --stride; the report marks results "
        "at another context length.",
    )
    require(resolved.num_inputs >= 1, f"--context-length is {wanted}; use 2 or more with --protocol {protocol.name}.")
    return resolved


def _stride(protocol: Protocol, context_length: int) -> int:
    if isinstance(protocol.stride, int):
        return protocol.stride
    if protocol.stride == "half":
        return max(1, context_length // 2)
    # A window counted in tokens has one input less and begins earlier to score every token, so its stride is less too.
    return context_length - (protocol.window == "tokens" and protocol.last == "extended")
