"""Trials of a model before use: causality, and independence of batch rows, packed documents and caches.

A model whose states look at later tokens trains to a loss near zero and scores as well, without an error anywhere. Each
trial is a few forward passes over random tokens. They run on a stand-in, a small random model of the same
configuration: its weights are large enough to show an influence that those of a new model would hide, and they are all
on this rank, in float32, whatever the precision and the partitioning of the model itself.
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
from megaft.weights.loading.stand_in import STAND_IN_ERRORS, is_partitioned, keeping_random_states, numbers_of, stand_in

TOLERANCE = 1e-3
"""Largest difference, relative to the mean size of the values, that counts as rounding. In float32 rounding is some
1e-6; an influence of one token of a hundred on the others is some 1e-2."""

HALF_PRECISIONS = (torch.bfloat16, torch.float16)

SHORTEST, LONGEST = 24, 320
"""Tokens of a trial: beyond any block that the configuration names, unless that takes more than LONGEST."""


def require_language_model(model: CausalLM, tried: CausalLM | None = None) -> None:
    """Refuse models that attend to later tokens, or whose rows depend on the rest of their batch.

    Args:
        model: The model.
        tried: What `on_trial` yields for it; by default it is made here. So it is with the other trials below.

    Raises:
        DataError: The model is neither a causal language model of tokens alone, nor can it be tried.
    """
    with on_trial(model, tried) as small, _naming_what_fails(model):
        require_causal(model, small)
        apart = keeps_rows_apart(small)
    if not apart:
        raise DataError(
            f"{family(model)} gives a text other states beside other texts of a batch; "
            "its loss would depend on the micro-batch size. Use a model of another family."
        )


def require_causal(model: CausalLM, tried: CausalLM | None = None) -> None:
    """Refuse models that attend to later tokens.

    Raises:
        DataError: The model is no causal language model of tokens alone, or cannot be tried.
    """
    with on_trial(model, tried) as small, _naming_what_fails(model):
        causal = is_causal(small)
    if not causal:
        raise DataError(
            f"{family(model)} attends to later tokens: it predicts each token from the text behind it too, "
            f"so that its loss means nothing. {_way_out(model)}"
        )


@contextmanager
def _naming_what_fails(model: CausalLM) -> Iterator[None]:
    try:
        yield
    except STAND_IN_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{family(model)} does not run on tokens alone ({said[:200]}). Use a causal language model of text."
        ) from error


def require_keeps_documents_apart(model: CausalLM, tried: CausalLM | None = None) -> None:
    """Refuse models whose attention is not confined by positions that begin anew.

    Raises:
        ConfigError: The documents of a row influence each other.
    """
    with on_trial(model, tried) as small:
        is_apart = keeps_documents_apart(small)
    if not is_apart:
        raise ConfigError(
            f"--data.attend-within-documents is set, but {family(model)} attends across documents; "
            "drop it, or use --data.sample document."
        )


@torch.no_grad()
def is_causal(model: CausalLM) -> bool:
    """Return whether states stay the same when later tokens change or are cut off."""
    tokens = random_tokens(model, trial_length(model))
    length = tokens.shape[1]
    whole = states_of(model, tokens)
    middle = length // 2 | 1
    changed = [_changed(model, tokens, first) for first in (length - 1, 2 * length // 3, middle, min(5, length - 1))]
    cut = [(first, tokens[:, :first]) for first in (length - 1, middle) if first < length]
    return all(_is_close(states_of(model, ids)[:, :first], whole[:, :first]) for first, ids in changed + cut if first)


def _changed(model: CausalLM, tokens: Tensor, first: int) -> tuple[int, Tensor]:
    """Return `first` and the tokens, all of them different from there on."""
    return first, torch.cat([tokens[:, :first], (tokens[:, first:] + 1) % vocab_size(model)], 1)


@torch.no_grad()
def keeps_rows_apart(model: CausalLM) -> bool:
    """Return whether the rows of a batch, filled up on the right, have the states that each has alone."""
    length = trial_length(model)
    lengths = [length, max(1, length // 2), min(3, length), length]
    rows = [random_tokens(model, length, seed=seed) for seed, length in enumerate(lengths)]
    batch = torch.cat([F.pad(row, (0, length - row.shape[1])) for row in rows])
    together = states_of(model, batch)
    return all(_is_close(states_of(model, row), together[i : i + 1, : row.shape[1]]) for i, row in enumerate(rows))


@torch.no_grad()
def keeps_documents_apart(model: CausalLM) -> bool:
    """Return whether documents in one row, given by positions that begin anew, have the states that each has alone."""
    longest = trial_length(model)
    scale = min(1.0, (context_limit(model) or math.inf) / (2 * longest + 12))
    lengths = [max(3, int(part * scale)) for part in (longest, 5, longest + 2, 3)]
    documents = [random_tokens(model, length, seed=seed) for seed, length in enumerate(lengths)]
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths]).unsqueeze(0)
    try:
        together = states_of(model, torch.cat(documents, 1), position_ids=positions)
    except STAND_IN_ERRORS:  # no such argument, or one of another meaning
        return False
    parts = together.split(lengths, 1)
    return all(_is_close(states_of(model, ids), part) for ids, part in zip(documents, parts, strict=True))


@torch.no_grad()
def keeps_cache(model: CausalLM, make_reader: Callable[[CausalLM], Any], tried: CausalLM | None = None) -> bool:
    """Return whether a text read token by token, with a cache, has the logits of a text read at once.

    Args:
        model: A whole model.
        make_reader: From a model to a sampling.Reader, such as generation.CachedModel.
        tried: What `on_trial` yields for it.
    """
    with on_trial(model, tried) as small:
        tokens = random_tokens(small, trial_length(small))
        begin = tokens.shape[1] // 3
        ids, reader = tokens[0].tolist(), make_reader(small)
        read = [reader.read(ids[:begin], 0)]
        read += [reader.read(ids[place : place + 1], place) for place in range(begin, len(ids))]
        whole = states_of(small, tokens)[0, begin - 1 :]
        return _is_close(torch.stack(read), whole)


LOUDER = 1000
"""Factor of hidden states in the trial: caps on logits show only where logits are large."""


@torch.no_grad()
def head_is_linear(model: CausalLM, tried: CausalLM | None = None) -> bool:
    """Return whether logits are the output layer of the base model's last state: some families scale or cap them.

    The model itself is asked, unless its weights are partitioned or in half precision, which float32 would double.
    """
    if not isinstance(model.get_output_embeddings(), nn.Linear) or model.base_model is model:
        return False  # no output layer, or one with an adapter; or no model below it by a name of transformers
    asked = tried if is_partitioned(model) or model.dtype in HALF_PRECISIONS else model
    with on_trial(model, asked) as whole:
        inputs = {"input_ids": torch.arange(8, device=whole.device).unsqueeze(0), "use_cache": False}
        layer = whole.get_output_embeddings()
        hidden = getattr(whole.base_model(**inputs), "last_hidden_state", None)
        if hidden is None:
            return False
        hidden = hidden * LOUDER
        with layer.register_forward_pre_hook(lambda _, inputs: inputs[0] * LOUDER):
            logits = whole(**inputs).logits
        if hidden.shape[-1] != layer.weight.shape[1]:
            return False
        linear = F.linear(hidden, layer.weight, layer.bias)  # here, where weights are in the dtype of the trial
    return bool((logits - linear).abs().max() <= 1e-4 * linear.abs().max())


def takes_columns(model: CausalLM) -> bool:
    """Return whether the model's forward pass can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def family(model: CausalLM) -> str:
    """Return the name of the model's class and its model_type."""
    return f"{type(model).__name__} (model_type {model.config.model_type})"


def states_of(model: CausalLM, input_ids: Tensor, **inputs: Tensor) -> Tensor:
    """Return the logits of every position."""
    return _comparable(model(input_ids=input_ids, use_cache=False, **inputs).logits)


def _comparable(logits: Tensor) -> Tensor:
    """Return the logits with 0.0 for tokens that the model rules out by -inf or float32's lowest value.

    NaN is refused: it differs from every number, and so looks like an influence.

    Raises:
        NumericsError: Some are NaN or infinite.
    """
    logits = logits.masked_fill(logits <= torch.finfo(logits.dtype).min / 2, 0.0)
    num_bad = int((~logits.isfinite()).sum())
    if num_bad:
        raise NumericsError(
            f"the model cannot be tried: {num_bad:,} of {logits.numel():,} logits of random tokens are not finite. Its "
            "weights are damaged, or a number of its config.json makes it overflow; copy the model anew."
        )
    return logits


def random_tokens(model: CausalLM, length: int, seed: int = 0) -> Tensor:
    """Return a row of random tokens, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size(model), (1, length), generator=generator).to(model.device)


BLOCK_NAME = re.compile(r"block|chunk|window|compress|conv|kernel|local|segment|stride|bucket|group_size|patch")
"""Names of settings that may be the number of tokens which an architecture treats together."""


def trial_length(model: CausalLM) -> int:
    """Return the length of a trial: beyond every block of tokens that the configuration names."""
    config = model.config.get_text_config()
    sizes = [size for name, value in config.to_dict().items() if BLOCK_NAME.search(name) for size in numbers_of(value)]
    longest = max((size for size in sizes if 1 < size <= LONGEST // 2), default=0)
    limits = (max(SHORTEST, longest + 13), context_limit(model), length_limit(model.config))
    return min(limit for limit in limits if limit is not None)


@contextmanager
def on_trial(model: CausalLM, tried: CausalLM | None = None) -> Iterator[CausalLM]:
    """The stand-in of a model; the model itself, without dropout, where there is none and the weights are whole.

    A model in half precision computes in float32 meanwhile, in twice its memory: bf16 rounds logits by up to 0.08 of
    their mean size with two layers, as much as an influence that is looked for.

    Args:
        model: The model.
        tried: What this yielded before, and yields again: a stand-in takes time and memory to make.
    """
    small = tried if tried is not None else stand_in(model)
    if small is None and is_partitioned(model):
        raise ConfigError(
            f"{family(model)} cannot be tried while ZeRO-3 has its weights in parts; "
            "use zero_optimization.stage 2 or less, or leave out --partition."
        )
    with keeping_random_states(), _evaluating(small if small is not None else model) as evaluated:
        torch.manual_seed(0)
        with _in_float32(evaluated):
            yield evaluated


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Give every tensor of half precision the same values in float32; afterwards all are as they were."""
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


def _way_out(model: CausalLM) -> str:
    config = model.config.get_text_config()
    if getattr(config, "is_decoder", True) is False:
        return "Give its config.json is_decoder true, if it was trained so, or use a causal model."
    if getattr(config, "causal", True) is False:
        return "Give its config.json causal true, if it was trained so, or use a causal model."
    if getattr(config, "use_bidirectional_attention", None):
        return "Drop use_bidirectional_attention from its config.json, if it was trained so, or use a causal model."
    return "Use a causal model."


def _is_close(ones: Tensor, others: Tensor) -> bool:
    if not ones.numel():
        return True
    return bool((ones - others).abs().max() <= TOLERANCE * others.abs().mean())
