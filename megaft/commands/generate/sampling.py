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
    """Sample the token that follows `previous_ids`; at temperature 0 return the most likely one.

    Raises:
        NumericsError: A logit is NaN or +inf; -inf is allowed, and marks a token that the model rules out.
    """
    require_finite_logits(logits, len(previous_ids))
    scores = logits.float().cpu()[None]  # a CPU generator draws the same numbers whatever the device
    ids: Any = torch.tensor([previous_ids])  # transformers annotates torch.LongTensor
    scores = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(ids, scores)
    if settings.temperature == 0:
        return int(scores.argmax())
    scores = filters(settings)(ids, divide(scores, settings.temperature))
    return int(torch.multinomial(scores[0].softmax(-1), 1, generator=generator))


def divide(logits: Float32[Tensor, "1 vocab"], temperature: float) -> Float32[Tensor, "1 vocab"]:
    """Divide the logits by a positive temperature, without overflow in float32."""
    divided = logits / temperature
    if not divided.isnan().any() and divided.isfinite().equal(logits.isfinite()):
        return divided
    return ((logits.double() - logits.max()) / temperature).float()  # softmax is the same


def filters(settings: SamplingConfig) -> LogitsProcessorList:
    """Return the enabled top-k and top-p filters."""
    enabled = LogitsProcessorList()
    if settings.top_k > 0:
        enabled.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        enabled.append(TopPLogitsWarper(settings.top_p))
    return enabled


@runtime_checkable
class Decoder(Protocol):
    """Interface for incremental decoding: a language model in evaluation mode, with its KV or state cache."""

    max_positions: int | None
    """Longest input; None if there is no limit."""
    vocab_size: int
    """Number of tokens that the model embeds."""

    def forward(self, token_ids: Sequence[int], num_past: int) -> Float[Tensor, " vocab"]:
        """Process the next tokens of a text, and return the logits after the last.

        Args:
            token_ids: The next tokens: any number at the start of a text, later a single one.
            num_past: Tokens of this text that were processed before; 0 starts a new text.
        """
        ...


@torch.no_grad()
def continue_tokens(
    model: Decoder,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    settings: SamplingConfig,
    seed: int,
    end_ids: Container[int] = (),
    num_opening: int = 0,
) -> Iterator[int]:
    """Yield new tokens up to and including one of `end_ids`, or until there are `max_new_tokens`.

    Each token is processed once. When the context is full, the older half of the tokens is dropped and the newer half
    is processed again at positions from 0, so a text can be longer than the model's context. If the prompt is longer
    than the context, only its last tokens are used. The opening tokens always stay in front.

    Args:
        model: The model. If it is sharded, every rank calls this and gets the same tokens.
        prompt_ids: One or more tokens.
        max_new_tokens: Largest number of new tokens.
        settings: Sampling of each token.
        seed: Random seed of this text, independent of other texts.
        end_ids: Tokens that end a text.
        num_opening: Special tokens at the start of the prompt, such as the beginning-of-sequence token.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = model.max_positions or sys.maxsize
    opening = list(prompt_ids[:num_opening]) if num_opening < limit else []
    limit -= len(opening)
    ids, num_past = list(prompt_ids), 0
    begin = max(len(opening), len(ids) - limit)
    for _ in range(max_new_tokens):
        if len(ids) - begin > limit:
            begin, num_past = len(ids) - (limit + 1) // 2, 0
        window = opening + ids[begin:] if num_past == 0 else ids[begin + num_past - len(opening) :]
        logits = model.forward(window, num_past)
        num_past = len(opening) + len(ids) - begin
        ids.append(next_token(logits, ids, settings, generator))
        yield ids[-1]
        if ids[-1] in end_ids:
            return
