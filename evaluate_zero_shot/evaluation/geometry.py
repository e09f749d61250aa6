"""Window geometry: a protocol's context length and stride, resolved for a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from evaluate_zero_shot.protocols import Protocol
from megaft.base.checks import require
from megaft.base.errors import ConfigError
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
    context_source: str
    """Source of the context length: the flag, the protocol or the model."""

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
    wanted, source = _context(protocol, context_limit, context_length)
    default_stride = _stride(protocol, wanted)
    is_default = wanted == (protocol.context_length or context_limit) and stride in (None, default_stride)
    resolved = Geometry(protocol, wanted, stride or default_stride, is_default, source)
    require(resolved.num_inputs >= 1, f"{source} is {wanted}; set --context-length to 2 or more.")
    _require_positions(resolved, context_limit, stride)
    largest = _largest_stride(protocol, wanted)
    stride_source = "--stride" if stride else f"the stride of --protocol {protocol.name}"
    require(
        1 <= resolved.stride <= largest,
        f"{stride_source} is {resolved.stride}, but {source} is {wanted}; set --stride to 1 to {largest}"
        f"{'.' if stride else f'; {MARKED}.'}",
    )
    return resolved


MARKED = "the report marks results at another context length or stride than the protocol's"


def _context(protocol: Protocol, context_limit: int | None, context_length: int | None) -> tuple[int, str]:
    """Return the context length and its source."""
    if context_length:
        return context_length, "--context-length"
    if protocol.context_length:
        return protocol.context_length, f"the context length of --protocol {protocol.name}"
    if context_limit is None:
        raise ConfigError(
            f"--context-length is not given, and neither --protocol {protocol.name} nor the model limits the context; "
            "give it, for example 1024."
        )
    return context_limit, "the model's number of positions"


def _require_positions(geometry: Geometry, context_limit: int | None, stride: int | None) -> None:
    """Refuse a window with more inputs than the model has positions; the message gives flags that fit."""
    if context_limit is None or geometry.num_inputs <= context_limit:
        return
    protocol, fix = geometry.protocol, f"set --context-length {context_limit}"
    if (stride or _stride(protocol, context_limit)) > _largest_stride(protocol, context_limit):
        fix += f" and --stride {max(1, context_limit // 2)}"
    raise ConfigError(
        f"{geometry.context_source} is {geometry.context_length}, but the model has {context_limit} positions; {fix}; "
        f"{MARKED}."
    )


def _largest_stride(protocol: Protocol, context_length: int) -> int:
    return context_length - (protocol.window == "tokens" and protocol.last == "extended")


def _stride(protocol: Protocol, context_length: int) -> int:
    if isinstance(protocol.stride, int):
        return protocol.stride
    if protocol.stride == "half":
        return max(1, context_length // 2)
    # A window counted in tokens has one input less and begins earlier to score every token, so its stride is less too.
    return _largest_stride(protocol, context_length)
