"""Sliding windows over a token list: the input tokens of each forward pass, and those that it scores."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Literal, NamedTuple

from megaft.base.checks import require


class Window(NamedTuple):
    """A row of a forward pass, as positions in a token list: inputs [begin, end - 1), targets [scored_from, end)."""

    begin: int
    scored_from: int
    end: int

    @property
    def columns(self) -> slice:
        """Columns of the row that predict the targets: column t predicts token begin + t + 1."""
        return slice(self.scored_from - self.begin - 1, self.end - self.begin - 1)


def windows(
    num_tokens: int,
    context_length: int,
    stride: int,
    *,
    first: Literal["full", "stride"] = "full",
    last: Literal["short", "extended"] = "extended",
) -> Iterator[Window]:
    """Yield windows of at most `context_length` inputs that score every token except the first exactly once.

    The defaults are the windows of lm-evaluation-harness's `get_rolling_token_windows`, whose `context_len` is
    context_length - stride + 1. With last="short" they are those of Megatron-LM's `tasks/zeroshot_gpt`; a stride of
    context_length + 1 then gives disjoint chunks, whose first tokens are not scored.

    Args:
        num_tokens: Length of the token list.
        context_length: Largest number of input tokens in a window.
        stride: Tokens scored per window after the first.
        first: "full": the first window scores all its targets; "stride": only as many as later windows.
        last: "short": the last window begins where its stride puts it; "extended": earlier, with a full context.

    Raises:
        ConfigError: The stride is less than 1, or would leave tokens unscored.
    """
    largest = context_length + (last == "short")
    require(1 <= stride <= largest, f"stride is {stride}; use 1 to {largest} with this context length.")
    scored_from = 1
    for nominal_end in count(1 + (context_length if first == "full" else stride), stride):
        end = min(nominal_end, num_tokens)
        begin = max(0, (nominal_end if last == "short" else end) - 1 - context_length)
        scored_from = max(scored_from, begin + 1)
        if scored_from >= end:
            return
        yield Window(begin, scored_from, end)
        scored_from = end
