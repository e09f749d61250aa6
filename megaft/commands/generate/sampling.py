"""Sampling of the next token, and the generation loop.

The loop is written out rather than left to transformers' `generate`, so that a seed gives the same text on any device
and in any batch. transformers' own filters apply, in its order: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megaft.commands.generate.config import SamplingConfig
from megaft.models.finite import require_finite_logits


def next_token(
    logits: Float[Tensor, " vocab"], previous_ids: Sequence[int], settings: SamplingConfig, generator: torch.Generator
) -> int:
    """Return the token that follows `previous_ids`, the most likely one at temperature 0.

    Raises:
        NumericsError: A logit is NaN or infinite; -inf is allowed, and marks a token that the model rules out.
    """
    require_finite_logits(logits, len(previous_ids))
    scores = logits.float().cpu()[None]  # a CPU generator draws the same numbers beside every device
    ids: Any = torch.tensor([previous_ids])  # transformers annotates torch.LongTensor
    scores = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(ids, scores)
    if settings.temperature == 0:
        return int(scores.argmax())
    scores = filters(settings)(ids, divide(scores, settings.temperature))
    return int(torch.multinomial(scores[0].softmax(-1), 1, generator=generator))


def divide(logits: Float32[Tensor, "1 vocab"], temperature: float) -> Float32[Tensor, "1 vocab"]:
    """Divide the logits by a temperature above 0, which may be too small or too large for float32."""
    divided = logits / temperature
    if not divided.isnan().any() and divided.isfinite().equal(logits.isfinite()):
        return divided
    return ((logits.double() - logits.max()) / temperature).float()  # softmax is the same


def filters(settings: SamplingConfig) -> LogitsProcessorList:
    """Return the top-k and top-p filters that the settings turn on."""
    found = LogitsProcessorList()
    if settings.top_k > 0:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(TopPLogitsWarper(settings.top_p))
    return found


@runtime_checkable
class Reader(Protocol):
    """A language model in evaluation that reads a text incrementally."""

    max_positions: int | None
    """Longest input; None if there is no limit."""
    vocab_size: int
    """Number of tokens that the model embeds."""

    def read(self, token_ids: Sequence[int], num_read: int) -> Float[Tensor, " vocab"]:
        """Read more of a text, and return the logits after its last token.

        Args:
            token_ids: What follows; a single token, but where a text begins.
            num_read: Tokens of this text read before; 0 forgets them all.
        """
        ...


@torch.no_grad()
def continue_tokens(
    model: Reader,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    settings: SamplingConfig,
    seed: int,
    end_ids: Container[int] = (),
    num_opening: int = 0,
) -> Iterator[int]:
    """Yield new tokens until one of `end_ids`, which is yielded too, or until there are `max_new_tokens`.

    Each token is read once. When they fill the model's positions, the older half is dropped and the newer half
    read again at positions from 0, so that a text can be longer than the model's context; of a longer prompt the last
    tokens are read, as many as it has positions. The opening tokens stay in front.

    Args:
        model: The model. Of one cut over ranks every rank calls this, and gets the same tokens.
        prompt_ids: One token or more.
        max_new_tokens: Where to stop.
        settings: How each token is chosen.
        seed: Fixes the draws of this text, whatever else is generated.
        end_ids: Tokens that end a text.
        num_opening: Tokens at the start of the prompt that are no text, such as the beginning-of-sequence token.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = model.max_positions or sys.maxsize
    opening = list(prompt_ids[:num_opening]) if num_opening < limit else []
    limit -= len(opening)
    ids, num_read = list(prompt_ids), 0
    begin = max(len(opening), len(ids) - limit)
    for _ in range(max_new_tokens):
        if len(ids) - begin > limit:
            begin, num_read = len(ids) - (limit + 1) // 2, 0
        window = opening + ids[begin:] if num_read == 0 else ids[begin + num_read - len(opening) :]
        logits = model.read(window, num_read)
        num_read = len(opening) + len(ids) - begin
        ids.append(next_token(logits, ids, settings, generator))
        yield ids[-1]
        if ids[-1] in end_ids:
            return
