"""transformers' causal language models, as modules that return nats."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Float32, Int64
from safetensors import SafetensorError
from torch import Tensor, nn

from megaft import parallel
from megaft.config import LoraConfig, ModelConfig
from megaft.errors import ConfigError, DataError
from megaft.foreign import require_inert
from megaft.loss import Head, token_nats
from megaft.models import trials
from megaft.models.adapters import add_adapters
from megaft.models.causal_lm import CausalLM, context_limit, vocab_size
from megaft.models.config_errors import first_line
from megaft.models.finite_weights import require_finite_weights, stored_tensors
from megaft.models.gguf_file import read_header, require_all_taken
from megaft.models.gguf_settings import require_same_settings
from megaft.models.host_room import agreed_room
from megaft.models.loading_report import without_report_table
from megaft.models.padding_tokens import read_padding_tokens
from megaft.models.size_limit import Room, no_larger_than, no_larger_than_memory
from megaft.models.stand_in import STAND_IN_ERRORS
from megaft.models.stored_weights import freeze_as_constructed, keeping_stored_weights
from megaft.models.text_model import require_causal_class
from megaft.models.weight_files import require_complete, require_not_quantized, require_weights, untied_weights


class NatsModel(nn.Module):
    """A language model that returns the nats of its labels instead of logits."""

    def __init__(self, language_model: CausalLM, cross_entropy: str = "chunked", tried: CausalLM | None = None):
        """Take a model; `tried` is what `trials.on_trial` yields for it, where that is at hand."""
        super().__init__()
        self.language_model = language_model
        self.head = (
            Head(language_model.get_output_embeddings(), cross_entropy)
            if trials.head_is_linear(language_model, tried)
            else None
        )

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        labels: Int64[Tensor, "batch time"],
        document_ids: Int64[Tensor, "batch time"] | None = None,
        per_token: bool = False,
    ) -> Float32[Tensor, ...]:
        """Return nats of `labels`, which are shifted by one already.

        Args:
            input_ids: Tokens.
            labels: The token after each; IGNORE_INDEX where it is not scored.
            document_ids: Equal numbers mark tokens of one document; attention and positions then stay inside it.
            per_token: Return each label's nats instead of their sum. Has no gradient.
        """
        inside = {} if document_ids is None else {"position_ids": positions_within(document_ids)}
        if self.head is None:
            logits = self.language_model(input_ids=input_ids, use_cache=False, **inside).logits
            nats = token_nats(logits, labels)
            return nats.detach() if per_token else nats.sum()
        hidden = self.language_model.base_model(input_ids=input_ids, use_cache=False, **inside).last_hidden_state
        return self.head(hidden, labels, per_token)


def positions_within(document_ids: Int64[Tensor, "batch time"]) -> Int64[Tensor, "batch time"]:
    """Return positions that begin anew with every document.

    Given these and no mask, transformers keeps attention inside each run of consecutive positions
    (masking_utils.find_packed_sequence_indices), for every kind of attention it has.
    """
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(is_first, steps, 0).cummax(1).values


MODEL_SETTING = "--model.path"
"""Setting of training that names the model."""

LOAD_ERRORS = (*STAND_IN_ERRORS, OSError, ImportError, MemoryError, SafetensorError, UnpicklingError)
"""Exceptions of transformers for a model it cannot read, or for a config.json whose values make no model."""


def load_language_model(
    source: str, dtype: torch.dtype = torch.float32, dropout: float | None = None, setting: str = MODEL_SETTING
) -> CausalLM:
    """Load a pretrained model from a hub name, a folder or a GGUF file.

    Args:
        source: The model.
        dtype: Of its weights, once they are loaded.
        dropout: Every dropout probability; None leaves them as they are.
        setting: Names the model in messages, as the user of the command gives it.

    Raises:
        DataError: It is not there, transformers cannot read it, or its weights are quantized, not finite, or not those
            of its config.json.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils import logging

    logging.disable_progress_bar()  # every rank would draw its own
    where, options = _location(source, setting)
    require_inert(setting, where)
    header = read_header(Path(source)) if options else None
    limit: AbstractContextManager[None] = nullcontext()
    if header is not None or Path(where).is_dir():
        size = require_weights(Path(where)) if header is None else header.size
        limit = no_larger_than(size, f"{setting} is {source}")
    config: Any = None
    try:
        config = _load_config(where, options)
        if not options:
            require_not_quantized(setting, source, config)
        set_dropout(config, dropout)
        lost = parallel.naming_lost_peers(parallel.rank())  # while parts are filled
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
        # Some families fail there only, with a message that says nothing.
        where = " at ZeRO stage 3 (stage 2 may do)" if is_deepspeed_zero3_enabled() else ""
        raise DataError(
            f"{setting} is {source}; transformers cannot load it{where}: {first_line(error, config)}"
        ) from error
    model, report = loaded
    require_complete(f"{setting} is {source}", report)
    if not is_deepspeed_zero3_enabled():  # there partitioned._fill checks whole weights
        require_finite_weights(f"{setting} is {source}", source, stored_tensors(model))
    _require_tied(f"{setting} is {source}", model)  # after that: a NaN does not equal itself
    if not is_deepspeed_zero3_enabled():
        freeze_as_constructed(model)
    if header is not None:
        require_all_taken(Path(source), header, model)
        require_same_settings(Path(source), header, model)
        model = _without_quantization(model)
    return read_padding_tokens(model)


def _require_tied(name: str, model: CausalLM) -> None:
    """Refuse weights that config.json ties and transformers did not: both are stored, and they differ."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    if apart := sorted(tied.keys() - model.all_tied_weights_keys.keys()):
        raise untied_weights(name, apart[0], tied[apart[0]])


def create_language_model(
    config_path: str, seed: int, dropout: float | None = None, room: Room | None = None
) -> CausalLM:
    """Initialise a new model from a config.json; the weights are a function of the seed."""
    config = read_new_config(config_path, dropout)
    return create_from(config, config_path, seed, room=room)


def read_new_config(config_path: str, dropout: float | None = None) -> Any:
    """Return the transformers configuration of a model to be initialised."""
    require_inert("--model.from-scratch", config_path)
    with _naming_bad_config(config_path):
        config = _load_config(config_path, {})
        set_dropout(config, dropout)
        return config


def create_from(config: Any, config_path: str, seed: int, parts: int = 1, room: Room | None = None) -> CausalLM:
    """Initialise a model of a configuration read from a config.json; `parts`, `room` as `no_larger_than_memory`."""
    with _naming_bad_config(config_path, config):
        torch.manual_seed(seed)
        with no_larger_than_memory(f"--model.from-scratch is {config_path}", parts, room):
            return new_model(config)


@contextmanager
def _naming_bad_config(config_path: str, config: Any = None) -> Iterator[None]:
    try:
        with parallel.naming_lost_peers(parallel.rank()):  # while parts are made
            yield
    except LOAD_ERRORS as error:
        raise DataError(
            f"--model.from-scratch is {config_path}; not a model config: {first_line(error, config)}"
        ) from error


def new_model(config: Any) -> CausalLM:
    """Return a new model of a transformers configuration, in fp32 and with random weights."""
    from transformers import AutoModelForCausalLM

    return read_padding_tokens(
        AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=_attention(config), trust_remote_code=False
        )
    )


def build(config: ModelConfig, lora: LoraConfig, seed: int, engine_config: dict[str, Any] | None = None) -> CausalLM:
    """Return the model a run starts from: loaded or new, with its adapters, in fp32. Every rank calls this.

    Args:
        config: Where it comes from.
        lora: Its adapters.
        seed: Of new weights.
        engine_config: What deepspeed.initialize will get. At ZeRO stage 3 every rank calls this and gets the model in
            parts, in the engine's precision. One with adapters or from a GGUF file is taken apart by DeepSpeed later.
    """
    is_gguf = config.path is not None and config.path.endswith(".gguf")
    if lora.rank or is_gguf or not is_stage_3(engine_config):
        return parallel.together(build_whole, config, lora, seed, agreed_room())
    if config.path is not None:
        with in_parts(engine_config, is_new=False):
            model = load_language_model(config.path, dropout=config.dropout)
    else:
        assert config.from_scratch is not None
        new_config = parallel.together(read_new_config, config.from_scratch, config.dropout)
        parts, room = parallel.world_size(), agreed_room()
        with in_parts(engine_config, is_new=True):
            model = create_from(new_config, config.from_scratch, seed, parts, room)
    return parallel.together(_recomputing, model, config)


def build_whole(config: ModelConfig, lora: LoraConfig, seed: int, room: Room | None = None) -> CausalLM:
    """Return the model a run starts from, whole on this rank, which may be alone in calling this."""
    if config.path is not None:
        model = load_language_model(config.path, dropout=config.dropout)
    else:
        assert config.from_scratch is not None
        model = create_language_model(config.from_scratch, seed, config.dropout, room)
    if lora.rank:
        add_adapters(model, lora, seed)
    return _recomputing(model, config)


def _recomputing(model: CausalLM, config: ModelConfig) -> CausalLM:
    """Return the model, with activation checkpointing where it is asked for."""
    if config.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"--model.activation-checkpointing is set, but {trials.family(model)} does not support it; drop it."
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def is_stage_3(engine_config: dict[str, Any] | None) -> bool:
    """Return True if the DeepSpeed configuration sets ZeRO stage 3."""
    return engine_config is not None and engine_config.get("zero_optimization", {}).get("stage") == 3


def in_parts(
    engine_config: dict[str, Any] | None, *, is_new: bool, setting: str = MODEL_SETTING
) -> AbstractContextManager[None]:
    """Return a context in which models are built as what deepspeed.initialize gets asks for: at stage 3 in parts."""
    if engine_config is None or not is_stage_3(engine_config):
        return nullcontext()
    from megaft.models import partitioned

    return partitioned.making(engine_config) if is_new else partitioned.loading(engine_config, setting)


def require_fits(model: CausalLM, tokenizer, longest_input: int) -> None:
    """Raise when the model has no embedding for a token, or no position for an input."""
    if tokenizer.vocab_size > vocab_size(model):
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {vocab_size(model)}; "
            "use the tokenizer the model was made with."
        )
    limit = context_limit(model)
    if limit is not None and longest_input > limit:
        raise ConfigError(
            f"--data.context-length or --eval.context-length is {longest_input}, but the model has {limit} positions; "
            f"use {limit} or less."
        )


def architecture(model: CausalLM) -> str:
    """Return a hash of the trained parameters' names and shapes, which a checkpoint must match."""
    parameters: Any = model.named_parameters()  # in parts, DeepSpeed keeps the shape of the whole in ds_shape
    trained = {name: getattr(one, "ds_shape", one.shape) for name, one in parameters if one.requires_grad}
    return architecture_of(type(model).__name__, trained)


def architecture_of(class_name: str, shapes: dict[str, torch.Size]) -> str:
    """Return the architecture of a model of a class of transformers, by the shapes of its trained parameters."""
    trained = sorted((name, tuple(shape)) for name, shape in shapes.items())
    return f"{class_name} {blake2b(repr(trained).encode(), digest_size=8).hexdigest()}"


def require_there(source: str, setting: str = MODEL_SETTING) -> None:
    """Raise DataError for what looks like a path and is not there; a hub name is found out later."""
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
        if isinstance(size, int) and size < 1:  # transformers takes it, and makes a model of nothing
            raise ValueError(f"{name} is {size}; use 1 or more.")
    return config


def _attention(config) -> str:
    """Return torch's fused attention where the architecture has it. What config.json names may be code on the hub."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def set_dropout(config: Any, dropout: float | None) -> None:
    """Give every dropout probability of a transformers configuration this value; None leaves them.

    LayerDrop (Fan et al. 2020) leaves out whole layers: 0.0 turns it off too, other values leave it.
    """
    if dropout is None:
        return
    names = r"(dropout|dropout_prob|dropout_rate|pdrop|_drop)$" if dropout else r"drop(out(_prob|_rate)?)?$"
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if re.search(names, name) and isinstance(value, int | float):
                setattr(part, name, dropout)


def _without_quantization(model: CausalLM) -> CausalLM:
    """Return the same weights in a model that `save_pretrained` accepts: one read from GGUF counts as quantized."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(model)._from_config(config, dtype=model.dtype)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    return fresh
