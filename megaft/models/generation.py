"""Generation with transformers' causal language models, using the family's key-value or state cache."""

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
"""Names of the cache argument and output of a forward pass: attention, state space models, RWKV."""

TRIAL_TOKENS = 8
TRIAL_PROMPT = 5
FP32_TOLERANCE, HALF_TOLERANCE = 1e-3, 5e-2
"""Largest difference between logits with and without the cache, relative to the largest logit. Rounding is below 1e-5
in float32, and about 1e-2 in half precision."""

FORWARD_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Exceptions from a forward pass that needs other inputs, or does not accept the cache that it returned."""


class CachedModel:
    """A transformers causal language model for incremental decoding with its cache: a sampling.Decoder.

    Without a cache each token takes a forward pass over the whole text.
    """

    def __init__(self, model: CausalLM, cache_name: str | None = None) -> None:
        """Wrap a model; `cache_name` is the forward pass's cache argument, from `exact_cache`."""
        self.max_positions = context_limit(model)
        self.vocab_size = vocab_size(model)
        self._model = model.eval()
        self._ids: list[int] = []
        self._cache: Any = None
        self._rescaling = rescaling_lengths(model.config)
        self.cache_name = cache_name

    def forward(self, token_ids: Sequence[int], num_past: int) -> Float[Tensor, " vocab"]:
        """Process tokens that follow the first `num_past`; return the logits after the last."""
        self._ids[num_past:] = token_ids
        if self.cache_name is None or self._rescales(num_past, len(self._ids)):
            num_past = 0
        return self._logits(self._ids[num_past:], is_start=num_past == 0)

    def _rescales(self, num_past: int, total: int) -> bool:
        """Return True if the rotary frequencies for `total` tokens differ from those of the cached keys."""
        return any(total > length and (is_growing or num_past <= length) for length, is_growing in self._rescaling)

    @torch.no_grad()
    def _logits(self, token_ids: Sequence[int], *, is_start: bool) -> Float[Tensor, " vocab"]:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([token_ids], device=self._model.device)}
        if _accepts(self._model, "use_cache"):
            inputs["use_cache"] = self.cache_name is not None
        if self.cache_name is not None:
            inputs[self.cache_name] = None if is_start else self._cache
        output = self._model(**inputs)
        self._cache = None if self.cache_name is None else output.get(self.cache_name)
        return output.logits[0, -1]


def exact_cache(model: CausalLM, trial_model: CausalLM | None = None) -> str | None:
    """Return the name of the model's cache argument if incremental decoding gives the same logits as one full pass.

    This is tested on the model itself, and on longer texts on its trial model.

    Args:
        model: An unpartitioned model.
        trial_model: From `trials.trial_model_of`; by default one is created here.

    Raises:
        DataError: The model needs inputs other than tokens.
        NumericsError: Its logits are not finite.
    """
    ids, plain = _trial_ids(model), CachedModel(model)
    try:
        expected = [plain.forward(ids[:end], 0) for end in (TRIAL_PROMPT, TRIAL_TOKENS)]
    except FORWARD_ERRORS as error:
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise DataError(
            f"--model is a {type(model).__name__}, which does not run on tokens alone ({reason}). "
            "Use a causal language model of text."
        ) from error
    for logits, num_tokens in zip(expected, (TRIAL_PROMPT, TRIAL_TOKENS), strict=True):
        require_finite_logits(logits, num_tokens)
    name = _cache_name(model)
    if name is None:
        return None
    decoder = CachedModel(model, name)
    try:
        logits = [decoder.forward(ids[:TRIAL_PROMPT], 0)]
        logits += [decoder.forward([ids[position]], position) for position in range(TRIAL_PROMPT, TRIAL_TOKENS)]
        is_exact = _is_close(logits[0], expected[0]) and _is_close(logits[-1], expected[1])
        is_exact = is_exact and trials.has_exact_cache(model, lambda tested: CachedModel(tested, name), trial_model)
        return name if is_exact else None
    except FORWARD_ERRORS:
        return None


def _trial_ids(model: CausalLM) -> list[int]:
    """Return tokens that include the padding token, which some families do not count as a position."""
    size, padding = vocab_size(model), getattr(model.config, "pad_token_id", None)
    ids = [number % size for number in range(1, 1 + TRIAL_TOKENS)]
    if isinstance(padding, int) and 0 <= padding < size:
        ids[1] = padding
    return ids


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = FP32_TOLERANCE if expected.dtype == torch.float32 else HALF_TOLERANCE
    largest = float(expected[expected.isfinite()].abs().max())  # a token that the model rules out has -inf
    return torch.allclose(actual.float(), expected.float(), rtol=0, atol=tolerance * largest)


def _accepts(model: CausalLM, name: str) -> bool:
    """Return True if the forward pass accepts a keyword argument, by name or through **kwargs."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _cache_name(model: CausalLM) -> str | None:
    """Return the name of the forward pass's cache argument if it is in CACHE_NAMES."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters and _accepts(model, "use_cache")), None)
