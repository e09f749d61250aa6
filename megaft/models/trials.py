"""Trials of a model before use: causality, batch invariance, document isolation and cache correctness.

A model that attends to later tokens trains to a loss near zero and scores as low, with no error anywhere. Each trial is
a few forward passes over random tokens. They run on a trial model, a small random model of the same configuration: its
weights are large enough to reveal an influence that newly initialized weights would hide, and they are all on this
rank, in float32, whatever the precision and partitioning of the model itself.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaft.base.errors import ConfigError, DataError, NumericsError
from megaft.models.rope import length_limit
from megaft.weights.loading.causal_lm import CausalLM, context_limit, vocab_size
from megaft.weights.loading.trial_model import (
    TRIAL_ERRORS,
    create_trial_model,
    is_partitioned,
    keeping_random_states,
    numbers_of,
)

TOLERANCE = 1e-3
"""Largest difference, relative to the mean absolute value, that counts as rounding. In float32 rounding is about 1e-6;
one token's influence on a hundred others is about 1e-2."""

HALF_PRECISIONS = (torch.bfloat16, torch.float16)

MIN_LENGTH, MAX_LENGTH = 24, 320
"""Range of a trial's length in tokens: longer than any block that the configuration names, up to MAX_LENGTH."""


def require_language_model(model: CausalLM, trial_model: CausalLM | None = None) -> None:
    """Refuse models that attend to later tokens, or whose output for a row depends on the rest of the batch.

    Args:
        model: The model.
        trial_model: From `trial_model_of`; by default one is created here. Likewise in the other trials below.

    Raises:
        DataError: The model is not a causal language model whose only input is tokens, or the trial fails.
    """
    with trial_model_of(model, trial_model) as tested, _naming_the_model(model):
        require_causal(model, tested)
        is_invariant = is_batch_invariant(tested)
    if not is_invariant:
        raise DataError(
            f"{family(model)} gives a text different logits depending on the other texts in its batch; "
            "its loss would depend on the micro-batch size. Use a model of another family."
        )


def require_causal(model: CausalLM, trial_model: CausalLM | None = None) -> None:
    """Refuse models that attend to later tokens.

    Raises:
        DataError: The model is not a causal language model whose only input is tokens, or the trial fails.
    """
    with trial_model_of(model, trial_model) as tested, _naming_the_model(model):
        causal = is_causal(tested)
    if not causal:
        raise DataError(
            f"{family(model)} attends to later tokens: it predicts each token from the text that follows, "
            f"so its loss is meaningless. {_suggested_fix(model)}"
        )


@contextmanager
def _naming_the_model(model: CausalLM) -> Iterator[None]:
    """Turn an error of a trial into a DataError that names the model."""
    try:
        yield
    except TRIAL_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{family(model)} does not run on tokens alone ({reason[:200]}). Use a causal language model of text."
        ) from error


def require_document_isolation(model: CausalLM, trial_model: CausalLM | None = None) -> None:
    """Refuse models that attend across packed documents although position ids restart in each.

    Raises:
        ConfigError: The documents of a row influence each other.
    """
    with trial_model_of(model, trial_model) as tested:
        is_isolated = isolates_documents(tested)
    if not is_isolated:
        raise ConfigError(
            f"--data.attend-within-documents is set, but {family(model)} attends across documents; "
            "drop it, or use --data.sample document."
        )


@torch.no_grad()
def is_causal(model: CausalLM) -> bool:
    """Return True if earlier logits stay the same when later tokens are changed or removed."""
    tokens = random_tokens(model, trial_length(model))
    length = tokens.shape[1]
    full = logits_of(model, tokens)
    middle = length // 2 | 1
    changed = [_changed(model, tokens, first) for first in (length - 1, 2 * length // 3, middle, min(5, length - 1))]
    truncated = [(first, tokens[:, :first]) for first in (length - 1, middle) if first < length]
    return all(
        _is_close(logits_of(model, ids)[:, :first], full[:, :first]) for first, ids in changed + truncated if first
    )


def _changed(model: CausalLM, tokens: Tensor, first: int) -> tuple[int, Tensor]:
    """Return `first` and the tokens with every token from that position on changed."""
    return first, torch.cat([tokens[:, :first], (tokens[:, first:] + 1) % vocab_size(model)], 1)


@torch.no_grad()
def is_batch_invariant(model: CausalLM) -> bool:
    """Return True if each row of a right-padded batch has the same logits as the row alone."""
    length = trial_length(model)
    lengths = [length, max(1, length // 2), min(3, length), length]
    rows = [random_tokens(model, length, seed=seed) for seed, length in enumerate(lengths)]
    batch = torch.cat([F.pad(row, (0, length - row.shape[1])) for row in rows])
    batched = logits_of(model, batch)
    return all(_is_close(logits_of(model, row), batched[i : i + 1, : row.shape[1]]) for i, row in enumerate(rows))


@torch.no_grad()
def isolates_documents(model: CausalLM) -> bool:
    """Return True if packed documents, marked by restarting position ids, have the same logits as each alone."""
    longest = trial_length(model)
    scale = min(1.0, (context_limit(model) or math.inf) / (2 * longest + 12))
    lengths = [max(3, int(length * scale)) for length in (longest, 5, longest + 2, 3)]
    documents = [random_tokens(model, length, seed=seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths]).unsqueeze(0)
    try:
        packed = logits_of(model, torch.cat(documents, 1), position_ids=positions)
    except TRIAL_ERRORS:  # position_ids is not accepted, or means something else
        return False
    per_document = packed.split(lengths, 1)
    return all(_is_close(logits_of(model, ids), logits) for ids, logits in zip(documents, per_document, strict=True))


@torch.no_grad()
def has_exact_cache(
    model: CausalLM, make_decoder: Callable[[CausalLM], Any], trial_model: CausalLM | None = None
) -> bool:
    """Return True if decoding token by token, with a cache, gives the logits of one full pass.

    Args:
        model: An unpartitioned model.
        make_decoder: Wraps a model as a sampling.Decoder, such as generation.CachedModel.
        trial_model: From `trial_model_of`.
    """
    with trial_model_of(model, trial_model) as tested:
        tokens = random_tokens(tested, trial_length(tested))
        begin = tokens.shape[1] // 3
        ids, decoder = tokens[0].tolist(), make_decoder(tested)
        incremental = [decoder.forward(ids[:begin], 0)]
        incremental += [decoder.forward(ids[position : position + 1], position) for position in range(begin, len(ids))]
        full = logits_of(tested, tokens)[0, begin - 1 :]
        return _is_close(torch.stack(incremental), full)


HIDDEN_SCALE = 1000
"""Factor applied to hidden states in this trial: a cap on logits shows only if they are large."""


@torch.no_grad()
def head_is_linear(model: CausalLM, trial_model: CausalLM | None = None) -> bool:
    """Return True if logits are just the output layer of the last hidden state; some families scale or cap them.

    The model itself is tested, unless its weights are partitioned or in half precision, which float32 would double.
    """
    if not isinstance(model.get_output_embeddings(), nn.Linear) or model.base_model is model:
        return False  # no output layer, or an adapted one; or no base model under transformers' name for it
    reuse = trial_model if is_partitioned(model) or model.dtype in HALF_PRECISIONS else model
    with trial_model_of(model, reuse) as tested:
        inputs = {"input_ids": torch.arange(8, device=tested.device).unsqueeze(0), "use_cache": False}
        layer = tested.get_output_embeddings()
        hidden = getattr(tested.base_model(**inputs), "last_hidden_state", None)
        if hidden is None:
            return False
        hidden = hidden * HIDDEN_SCALE
        with layer.register_forward_pre_hook(lambda _, inputs: inputs[0] * HIDDEN_SCALE):
            logits = tested(**inputs).logits
        if hidden.shape[-1] != layer.weight.shape[1]:
            return False
        linear = F.linear(hidden, layer.weight, layer.bias)  # inside the block: weights are in the trial's dtype
    return bool((logits - linear).abs().max() <= 1e-4 * linear.abs().max())


def supports_logits_to_keep(model: CausalLM) -> bool:
    """Return True if the model's forward pass can compute the logits of selected positions only."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def family(model: CausalLM) -> str:
    """Return the name of the model's class and its model_type."""
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def logits_of(model: CausalLM, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits of every position, with ruled-out tokens set to 0.0."""
    return _comparable(model(input_ids=input_ids, use_cache=False, **inputs).logits)


def _comparable(logits: Tensor) -> Tensor:
    """Return the logits with 0.0 for tokens that the model rules out with -inf or float32's lowest value.

    NaN is refused, because it differs from every number and would look like an influence.

    Raises:
        NumericsError: Some logits are NaN or +inf.
    """
    logits = logits.masked_fill(logits <= torch.finfo(logits.dtype).min / 2, 0.0)
    num_bad = int((~logits.isfinite()).sum())
    if num_bad:
        raise NumericsError(
            f"the model cannot be tested: {num_bad:,} of {logits.numel():,} logits of random tokens are not finite. "
            "Its weights are damaged, or a value in its config.json makes it overflow; copy the model again."
        )
    return logits


def random_tokens(model: CausalLM, length: int, seed: int = 0) -> Tensor:
    """Return a row of random tokens drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size(model), (1, length), generator=generator).to(model.device)


BLOCK_NAME = re.compile(r"block|chunk|window|compress|conv|kernel|local|segment|stride|bucket|group_size|patch")
"""Names of settings that may be the size of a block of tokens, such as an attention window."""


def trial_length(model: CausalLM) -> int:
    """Return the length of a trial, longer than any block of tokens that the configuration names."""
    config = model.config.get_text_config()
    sizes = [size for name, value in config.to_dict().items() if BLOCK_NAME.search(name) for size in numbers_of(value)]
    longest = max((size for size in sizes if 1 < size <= MAX_LENGTH // 2), default=0)
    limits = (max(MIN_LENGTH, longest + 13), context_limit(model), length_limit(model.config))
    return min(limit for limit in limits if limit is not None)


@contextmanager
def trial_model_of(model: CausalLM, reuse: CausalLM | None = None) -> Iterator[CausalLM]:
    """Yield a trial model in evaluation mode: a small random model, or the model itself if none can be created.

    A model in half precision computes in float32 within the block, in twice its memory: with two layers bf16 rounds
    logits by up to 0.08 of their mean size, as much as the influences that trials look for.

    Args:
        model: The model.
        reuse: An existing trial model to yield, since creating one takes time and memory.

    Raises:
        ConfigError: No small model can be created, and the model is partitioned.
    """
    trial_model = reuse if reuse is not None else create_trial_model(model)
    if trial_model is None and is_partitioned(model):
        raise ConfigError(
            f"{family(model)} cannot be tested while ZeRO-3 partitions its weights; "
            "use zero_optimization.stage 2 or less, or drop --partition."
        )
    with keeping_random_states(), _evaluating(model if trial_model is None else trial_model) as tested:
        torch.manual_seed(0)
        with _in_float32(tested):
            yield tested


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Convert half-precision tensors to float32 within the block, and back afterwards."""
    tensors = [*model.parameters(), *model.buffers()]
    halves = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in HALF_PRECISIONS]
    try:
        for tensor, _ in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)


@contextmanager
def _evaluating(model: CausalLM) -> Iterator[CausalLM]:
    was_training = model.training
    try:
        yield model.eval()
    finally:
        model.train(was_training)


def _suggested_fix(model: CausalLM) -> str:
    config = model.config.get_text_config()
    if getattr(config, "is_decoder", True) is False:
        return "If it was trained as a decoder, set is_decoder to true in its config.json; else use a causal model."
    if getattr(config, "causal", True) is False:
        return "If it was trained causally, set causal to true in its config.json; else use a causal model."
    if getattr(config, "use_bidirectional_attention", None):
        return "If it was trained causally, drop use_bidirectional_attention from its config.json; else use another."
    return "Use a causal model."


def _is_close(actual: Tensor, expected: Tensor) -> bool:
    if not actual.numel():
        return True
    return bool((actual - expected).abs().max() <= TOLERANCE * expected.abs().mean())
