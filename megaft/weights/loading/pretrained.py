"""Load causal language models with transformers, or initialize new ones, with checks that transformers lacks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from megaft.base import parallel
from megaft.base.errors import DataError
from megaft.base.gguf import read_header
from megaft.base.untrusted import require_safe_files
from megaft.weights.loading.causal_lm import CausalLM
from megaft.weights.loading.config_errors import first_line
from megaft.weights.loading.finite_weights import require_finite_weights, stored_tensors
from megaft.weights.loading.gguf_settings import require_all_weights_loaded, require_same_settings
from megaft.weights.loading.loading_report import without_report_table
from megaft.weights.loading.padding_tokens import attend_to_padding_tokens
from megaft.weights.loading.size_limit import MemoryBudget, Size, no_larger_than, no_larger_than_memory
from megaft.weights.loading.stored_weights import freeze_as_constructed, keeping_stored_weights
from megaft.weights.loading.text_model import require_causal_class
from megaft.weights.loading.trial_model import TRIAL_ERRORS
from megaft.weights.loading.weight_files import require_complete, require_not_quantized, require_weights, untied_weights

MODEL_SETTING = "--model.path"
"""Training's setting for the model."""

LOAD_ERRORS = (*TRIAL_ERRORS, OSError, ImportError, MemoryError, SafetensorError, UnpicklingError)
"""Exceptions of transformers for a model it cannot load or an invalid config.json."""


def load_language_model(
    source: str, dtype: torch.dtype = torch.float32, dropout: float | None = None, setting: str = MODEL_SETTING
) -> CausalLM:
    """Load a pretrained model from a hub name, a folder or a GGUF file.

    Args:
        source: The model.
        dtype: Dtype of the loaded weights.
        dropout: Every dropout probability; None leaves them unchanged.
        setting: Setting that names the model, for messages.

    Raises:
        DataError: The model does not exist, transformers cannot load it, or its weights are quantized, not finite, or
            do not match its config.json.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    logging.disable_progress_bar()  # every rank would show its own
    where, options = _location(source, setting)
    require_safe_files(setting, where)
    header = read_header(Path(source)) if options else None
    limit: AbstractContextManager[None] = nullcontext()
    if header is not None or Path(where).is_dir():
        size = require_weights(Path(where)) if header is None else Size(len(header.tensors), header.num_elements)
        limit = no_larger_than(size, f"{setting} is {source}")
    config: Any = None
    try:
        config = _load_config(where, options)
        if not options:
            require_not_quantized(setting, source, config)
        set_dropout(config, dropout)
        lost = parallel.naming_lost_peers(parallel.rank())  # while shards are loaded
        with limit, lost, keeping_stored_weights(), without_report_table():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                dtype=dtype,
                attn_implementation=_attention(config),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                weights_only=True,
                **options,
            )
    except LOAD_ERRORS as error:
        # Some families fail only at stage 3, with an unhelpful message.
        where = " at ZeRO stage 3 (stage 2 may work)" if is_deepspeed_zero3_enabled() else ""
        raise DataError(
            f"{setting} is {source}; transformers cannot load it{where}: {first_line(error, config)}"
        ) from error
    model, report = loaded
    require_complete(f"{setting} is {source}", report)
    if not is_deepspeed_zero3_enabled():  # at stage 3 partitioned._fill checks whole weights
        require_finite_weights(f"{setting} is {source}", source, stored_tensors(model))
    _require_tied(f"{setting} is {source}", model)  # after the finite check: NaN does not equal itself
    if not is_deepspeed_zero3_enabled():
        freeze_as_constructed(model)
    if header is not None:
        require_all_weights_loaded(Path(source), header, model)
        require_same_settings(Path(source), header, model)
        model = _without_quantization(model)
    return attend_to_padding_tokens(model)


def _require_tied(name: str, model: CausalLM) -> None:
    """Refuse weights that config.json ties, but whose stored tensors differ, so that transformers left them untied."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if untied := sorted(tied.keys() - model.all_tied_weights_keys.keys()):
        raise untied_weights(name, untied[0], tied[untied[0]])


def create_language_model(
    config_path: str, seed: int, dropout: float | None = None, budget: MemoryBudget | None = None
) -> CausalLM:
    """Initialize a new model from a config.json; its weights depend only on the seed."""
    config = read_new_config(config_path, dropout)
    return create_from(config, config_path, seed, budget=budget)


def read_new_config(config_path: str, dropout: float | None = None) -> Any:
    """Return the transformers configuration of a model to be initialized."""
    require_safe_files("--model.from-scratch", config_path)
    with _naming_bad_config(config_path):
        config = _load_config(config_path, {})
        set_dropout(config, dropout)
        return config


def create_from(
    config: Any, config_path: str, seed: int, parts: int = 1, budget: MemoryBudget | None = None
) -> CausalLM:
    """Initialize a model from a configuration; `parts` and `budget` are those of `no_larger_than_memory`."""
    with _naming_bad_config(config_path, config):
        torch.manual_seed(seed)
        with no_larger_than_memory(f"--model.from-scratch is {config_path}", parts, budget):
            return new_model(config)


@contextmanager
def _naming_bad_config(config_path: str, config: Any = None) -> Iterator[None]:
    try:
        with parallel.naming_lost_peers(parallel.rank()):  # while shards are built
            yield
    except LOAD_ERRORS as error:
        raise DataError(
            f"--model.from-scratch is {config_path}; invalid model config: {first_line(error, config)}"
        ) from error


def new_model(config: Any) -> CausalLM:
    """Return a new fp32 model of a transformers configuration, with random weights."""
    from transformers import AutoModelForCausalLM

    return attend_to_padding_tokens(
        AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=_attention(config), trust_remote_code=False
        )
    )


def require_exists(source: str, setting: str = MODEL_SETTING) -> None:
    """Raise DataError for a local path that does not exist; hub names are checked later."""
    _location(source, setting)


def _location(source: str, setting: str) -> tuple[str, dict[str, str]]:
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise DataError(f"{setting} is {source}; there is no such file. Give a GGUF file, a folder or a hub name.")
        return str(path.parent), {"gguf_file": path.name}
    looks_local = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if looks_local and not path.is_dir():
        raise DataError(f"{setting} is {source}; there is no such folder. Give a folder, a GGUF file or a hub name.")
    return source, {}


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def _load_config(where: str, options: dict[str, str]):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    require_causal_class(config)
    text = config.get_text_config()
    for name in SIZES:
        size = getattr(text, name, 1)
        if isinstance(size, int) and size < 1:  # transformers accepts it and builds an empty model
            raise ValueError(f"{name} is {size}; use 1 or more.")
    return config


def _attention(config) -> str:
    """Return "sdpa" where the architecture supports it, never config.json's choice, which may be code on the hub."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def set_dropout(config: Any, dropout: float | None) -> None:
    """Set every dropout probability of a transformers configuration; None leaves them unchanged.

    LayerDrop (Fan et al. 2020), which skips whole layers, is turned off by 0.0 and unchanged by other values.
    """
    if dropout is None:
        return
    for part in (config, config.get_text_config()):
        for name in dropout_fields(part.to_dict(), dropout):
            setattr(part, name, dropout)


def dropout_fields(config: dict[str, Any], dropout: float | None) -> list[str]:
    """Return the fields of a configuration that a dropout probability replaces; none for None."""
    if dropout is None:
        return []
    names = r"(dropout|dropout_prob|dropout_rate|pdrop|_drop)$" if dropout else r"drop(out(_prob|_rate)?)?$"
    return [name for name, value in config.items() if re.search(names, name) and isinstance(value, int | float)]


def _without_quantization(model: CausalLM) -> CausalLM:
    """Copy the weights to a model that `save_pretrained` accepts, as models loaded from GGUF count as quantized."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh
