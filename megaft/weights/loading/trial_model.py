"""Trial models: small random models of a family, tested in place of models that are too large or already sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from megaft.weights.loading.causal_lm import CausalLM
from megaft.weights.loading.padding_tokens import attend_to_padding_tokens

TRIAL_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    OverflowError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)
"""Exceptions of a family's modules for unsupported configurations or inputs."""

VOCAB_SIZE = 64
"""Vocabulary size of a trial model."""

MAX_PARAMETERS = 50_000_000
"""Largest trial model with the model's own number of layers and experts: 0.2 GB, built in a second."""

MAX_PARAMETERS_OF_FEW_LAYERS = 2_000_000_000
"""Largest trial model with the model's width and one layer of each kind: 8 GB, for a width of 20,480."""

SHORT_BLOCKS = dict.fromkeys(
    (
        "sliding_window",
        "window_size",
        "attention_window_size",
        "attention_chunk_size",
        "chunk_size",
        "mamba_chunk_size",
    ),
    16,
)
"""Windows and blocks that a trial model shortens, so that a short text exceeds them."""

FEW_EXPERTS = {"num_experts": 16, "num_local_experts": 16, "n_routed_experts": 16, "moe_num_experts": 16}
NARROW = {"intermediate_size": 256, "moe_intermediate_size": 64, "ffn_hidden_size": 256, "n_inner": 256}


def is_partitioned(model: nn.Module) -> bool:
    """Return True if ZeRO-3 has partitioned the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def keeping_random_states() -> AbstractContextManager[None]:
    """Restore the random states of the CPU and of this rank's GPU on exit.

    By default fork_rng saves those of every visible GPU, and warns if there are several.
    """
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def create_trial_model(model: CausalLM) -> CausalLM | None:
    """Return a small random model of a model's family, or None if none runs.

    It has the model's width and boolean settings, a small vocabulary, short windows, and the first layers up to one of
    each kind, or all layers of a small model whose layers cannot be reduced. Its weights are noisy, so that any
    influence between tokens shows in the logits.
    """
    make, attention = type(model)._from_config, model.config._attn_implementation
    ids = torch.arange(5).unsqueeze(0)
    for config, max_parameters in _configurations(model.config, make):
        with keeping_random_states(), torch.no_grad():
            torch.manual_seed(0)
            try:
                if num_parameters(config, make) > max_parameters:
                    continue
                trial_model = make(config, dtype=torch.float32, attn_implementation=attention)
                add_noise(attend_to_padding_tokens(trial_model)).eval()(input_ids=ids, use_cache=False)
            except TRIAL_ERRORS:
                continue
            return trial_model
    return None


@torch.no_grad()
def add_noise(model: CausalLM) -> CausalLM:
    """Add noise to every parameter, scaled to preserve the size of activations from layer to layer."""
    for parameter in model.parameters():
        fan_in = parameter.numel() / parameter.shape[0] if parameter.ndim > 1 else 25
        parameter.add_(torch.randn_like(parameter) / math.sqrt(fan_in))
    return model


def _configurations(config: Any, make_model: Callable[..., CausalLM]) -> Iterator[tuple[Any, int]]:
    """Yield smaller configurations, smallest first, each with its maximum number of parameters."""
    for make, max_parameters in ((_with_few_layers, MAX_PARAMETERS_OF_FEW_LAYERS), (lambda text: text, MAX_PARAMETERS)):
        small = deepcopy(config)
        try:
            text = small.get_text_config()
            _shorten(text)
            make(text)
            if num_parameters(small, make_model) > MAX_PARAMETERS:
                _lower(text, FEW_EXPERTS | NARROW)
        except TRIAL_ERRORS:
            continue
        yield small, max_parameters


def _shorten(text: Any) -> None:
    text.vocab_size = VOCAB_SIZE
    if (getattr(text, "pad_token_id", None) or 0) >= VOCAB_SIZE:
        text.pad_token_id = 0
    _lower(text, SHORT_BLOCKS | {"vocab_size_per_layer_input": VOCAB_SIZE})


def _lower(text: Any, largest: dict[str, int]) -> None:
    for name, value in largest.items():
        if isinstance(current := getattr(text, name, None), int) and current > value:
            setattr(text, name, value)


def _with_few_layers(text: Any) -> None:
    """Keep the first layers, up to one of each kind that the configuration's per-layer lists distinguish."""
    depth = text.num_hidden_layers
    names = sorted(set(dir(text)) - set(dir(PreTrainedConfig)))  # some attributes of all families warn when read
    lists = {name: value for name in names if _is_list_of(depth, value := _read(text, name))}
    if depth < 2 or not lists:
        text.num_hidden_layers = min(depth, 1 + getattr(text, "first_k_dense_replace", 0))
        return
    kinds = list(zip(*map(_hashable, lists.values()), strict=True))
    few = 1 + max(map(kinds.index, kinds))
    for name, value in lists.items():
        if name in vars(text):
            setattr(text, name, value[:few])
    text.num_hidden_layers = few


def _read(text: Any, name: str) -> Any:
    if name.startswith("_"):
        return None
    try:
        return getattr(text, name)
    except TRIAL_ERRORS:  # a property that fails for this configuration
        return None


def _is_list_of(length: int, value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == length


def _hashable(values: Any) -> list[str]:
    return [repr(value) for value in values]


def numbers_of(value: Any) -> Iterator[int]:
    """Yield the integers in a setting: the value itself, or those of a list or mapping."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers_of(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def num_parameters(config: Any, make_model: Callable[..., CausalLM] = AutoModelForCausalLM.from_config) -> int:
    """Return the number of parameters of a configuration's model, without allocating them."""
    with torch.device("meta"):
        model = make_model(config)
    return sum(parameter.numel() for parameter in model.parameters())
