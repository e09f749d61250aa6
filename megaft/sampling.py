"""The choice of the next token, and the loop that continues a list of tokens.

Written out rather than left to transformers' `generate`, so that a seed gives the same text on any device and in any
company. The filters apply in transformers' order: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from megaft.errors import NumericsError
from megaft.generate import SamplingConfig
from megaft.models.hugging_face import context_limit


def next_token(
    logits: Float[Tensor, " vocab"], previous_ids: Sequence[int], settings: SamplingConfig, generator: torch.Generator
) -> int:
    """Return the token that follows `previous_ids`, the most likely one at temperature 0.

    Raises:
        NumericsError: A logit is not a number.
    """
    logits = logits.float().cpu()  # a CPU generator draws the same numbers beside every device
    if logits.isnan().any():
        raise NumericsError("the model's logits are not numbers; check the checkpoint, or use --dtype float32.")
    logits = penalize_repetition(logits, previous_ids, settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    logits = keep_top_k(logits / settings.temperature, settings.top_k)
    logits = keep_top_p(logits, settings.top_p)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def penalize_repetition(
    logits: Float32[Tensor, " vocab"], previous_ids: Sequence[int], penalty: float
) -> Float32[Tensor, " vocab"]:
    """Divide the positive logits of tokens seen before by `penalty`, and multiply the negative ones (1.0: none).

    CTRL (Keskin et al. 2019, section 4.1). As in transformers, the prompt counts as seen.
    """
    seen = torch.tensor(sorted(set(previous_ids)), dtype=torch.int64)
    scores = logits[seen]
    return logits.index_copy(0, seen, torch.where(scores < 0, scores * penalty, scores / penalty))


def keep_top_k(logits: Float32[Tensor, " vocab"], k: int) -> Float32[Tensor, " vocab"]:
    """Leave the k highest logits, and any that ties with the last of them, and put the others to -inf (0: all stay).

    Fan et al. 2018, section 5.4.
    """
    if k == 0 or k >= len(logits):
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -math.inf)


def keep_top_p(logits: Float32[Tensor, " vocab"], p: float) -> Float32[Tensor, " vocab"]:
    """Leave the fewest tokens whose probabilities add up to p or more, and put the others to -inf (1.0: all stay).

    Nucleus sampling (Holtzman et al. 2020, section 3.1).
    """
    if p == 1:
        return logits
    probabilities, order = logits.softmax(-1).sort(descending=True)
    is_likelier_mass_enough = probabilities.cumsum(-1) - probabilities >= p
    return logits.index_fill(0, order[is_likelier_mass_enough], -math.inf)


@runtime_checkable
class Reader(Protocol):
    """A language model in evaluation that reads a text bit by bit."""

    max_positions: int | None
    """Its longest input; None where it has no limit."""

    def read(self, token_ids: Sequence[int], num_read: int) -> Float[Tensor, " vocab"]:
        """Read more of a text, and return the logits after its last token.

        Args:
            token_ids: What follows; a single token, but where a text begins.
            num_read: Tokens of this text read before; 0 forgets them all.
        """
        ...


class CachedModel:
    """A transformers causal language model as a Reader, which keeps keys and values."""

    def __init__(self, model: Any) -> None:
        self.max_positions = context_limit(model)
        self._model, self._cache = model, None

    def read(self, token_ids: Sequence[int], num_read: int) -> Float[Tensor, " vocab"]:
        """Read tokens behind `num_read` others; return the logits after the last."""
        input_ids = torch.tensor([token_ids], device=self._model.device)
        cache = self._cache if num_read else None
        output = self._model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        self._cache = output.past_key_values
        return output.logits[0, -1]


@torch.no_grad()
def continue_tokens(
    model: Reader,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    settings: SamplingConfig,
    seed: int,
    eos_id: int | None = None,
) -> Iterator[int]:
    """Yield new tokens until `eos_id`, which is yielded too, or until there are `max_new_tokens`.

    Each token is read once. When they fill the model's positions, the older half is dropped and the newer half
    read again at positions from 0, so that a text can be longer than the model's context; of a longer prompt the last
    tokens are read, as many as it has positions.

    Args:
        model: The model. Of one cut over ranks every rank calls this, and gets the same tokens.
        prompt_ids: One token or more.
        max_new_tokens: Where to stop.
        settings: How each token is chosen.
        seed: Fixes the draws of this text, whatever else is generated.
        eos_id: The token that ends a text; None goes on.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = model.max_positions or sys.maxsize
    ids, num_read = list(prompt_ids), 0
    begin = max(0, len(ids) - limit)
    for _ in range(max_new_tokens):
        if len(ids) - begin > limit:
            begin, num_read = len(ids) - (limit + 1) // 2, 0
        logits = model.read(ids[begin + num_read :], num_read)
        num_read = len(ids) - begin
        ids.append(next_token(logits, ids, settings, generator))
        yield ids[-1]
        if ids[-1] == eos_id:
            return
