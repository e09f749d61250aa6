"""Generation with transformers' causal language models, with the cache of their family."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from megaft.base.errors import DataError
from megaft.models import trials
from megaft.models.finite import require_finite_logits
from megaft.models.rope import rescaling_lengths
from megaft.weights.loading.causal_lm import CausalLM, context_limit, vocab_size

CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""Keywords and outputs of families' caches: attention, state space models, RWKV."""

TRIAL_TOKENS = 8
TRIAL_PROMPT = 5
TOLERANCE = {torch.float32: 1e-3}
"""Largest difference between logits with and without the cache, as a part of the largest logit: rounding alone is
below 1e-5 in float32. Half precision rounds each logit to about 1e-2."""
HALF_TOLERANCE = 5e-2

FORWARD_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Exceptions of a forward pass that needs other inputs, or does not take the cache that it returned."""


class CachedModel:
    """A transformers causal language model as a sampling.Reader. Without a cache it reads the whole text every time."""

    def __init__(self, model: CausalLM, cache_name: str | None = None) -> None:
        """Take a model and the keyword of the cache to use, as `exact_cache` returns it."""
        self.max_positions = context_limit(model)
        self.vocab_size = vocab_size(model)
        self._model = model.eval()
        self._ids: list[int] = []
        self._cache: Any = None
        self._rescaling = rescaling_lengths(model.config)
        self.cache_name = cache_name

    def read(self, token_ids: Sequence[int], num_read: int) -> Float[Tensor, " vocab"]:
        """Read tokens behind `num_read` others; return the logits after the last."""
        self._ids[num_read:] = token_ids
        if self.cache_name is None or self._rescales(num_read, len(self._ids)):
            num_read = 0
        return self._logits(self._ids[num_read:], is_start=num_read == 0)

    def _rescales(self, num_read: int, total: int) -> bool:
        """Return whether rotary frequencies of `total` tokens differ from those that cached keys were rotated by."""
        return any(total > length and (is_growing or num_read <= length) for length, is_growing in self._rescaling)

    @torch.no_grad()
    def _logits(self, token_ids: Sequence[int], *, is_start: bool) -> Float[Tensor, " vocab"]:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([token_ids], device=self._model.device)}
        if _takes(self._model, "use_cache"):
            inputs["use_cache"] = self.cache_name is not None
        if self.cache_name is not None:
            inputs[self.cache_name] = None if is_start else self._cache
        output = self._model(**inputs)
        self._cache = None if self.cache_name is None else output.get(self.cache_name)
        return output.logits[0, -1]


def exact_cache(model: CausalLM, tried: CausalLM | None = None) -> str | None:
    """Return the keyword of the family's cache, if tokens read one by one have the logits of one pass over all of them.

    It is tried on the model itself, and on longer texts on a small stand-in.

    Args:
        model: A whole model.
        tried: What `trials.on_trial` yields for it.

    Raises:
        DataError: The model does not read tokens alone.
        NumericsError: Its logits are not finite.
    """
    ids, plain = _trial_ids(model), CachedModel(model)
    try:
        expected = [plain.read(ids[:end], 0) for end in (TRIAL_PROMPT, TRIAL_TOKENS)]
    except FORWARD_ERRORS as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise DataError(f"model's {type(model).__name__} cannot read a plain text ({reason}).") from error
    for logits, num_read in zip(expected, (TRIAL_PROMPT, TRIAL_TOKENS), strict=True):
        require_finite_logits(logits, num_read)
    name = _cache_name(model)
    if name is None:
        return None
    reader = CachedModel(model, name)
    try:
        logits = [reader.read(ids[:TRIAL_PROMPT], 0)]
        logits += [reader.read([ids[place]], place) for place in range(TRIAL_PROMPT, TRIAL_TOKENS)]
        is_exact = _agree(logits[0], expected[0]) and _agree(logits[-1], expected[1])
        keeps = is_exact and trials.keeps_cache(model, lambda small: CachedModel(small, name), tried)
        return name if keeps else None
    except FORWARD_ERRORS:
        return None


def _trial_ids(model: CausalLM) -> list[int]:
    """Return a text with the padding token in it, which some families do not count as a position."""
    size, padding = vocab_size(model), getattr(model.config, "pad_token_id", None)
    ids = [number % size for number in range(1, 1 + TRIAL_TOKENS)]
    if isinstance(padding, int) and 0 <= padding < size:
        ids[1] = padding
    return ids


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = TOLERANCE.get(theirs.dtype, HALF_TOLERANCE)
    largest = float(theirs[theirs.isfinite()].abs().max())  # a token that the model rules out has -inf
    return torch.allclose(ours.float(), theirs.float(), rtol=0, atol=tolerance * largest)


def _takes(model: CausalLM, name: str) -> bool:
    """Return whether the forward pass takes a keyword, or hands any on to the layers below its head."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _cache_name(model: CausalLM) -> str | None:
    """Return the keyword of the family's cache that its forward pass takes, if it is one that is known here."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters and _takes(model, "use_cache")), None)
