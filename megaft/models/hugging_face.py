"""transformers' causal language models, as modules that return nats."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from megaft.base import parallel
from megaft.base.agreement import together
from megaft.base.errors import ConfigError, DataError
from megaft.config.train import LoraConfig, ModelConfig
from megaft.models import trials
from megaft.models.adapters import add_adapters
from megaft.models.attention import document_mask, takes_masks
from megaft.models.fused import fuse
from megaft.models.head import Head
from megaft.models.loss import at_positions, token_nats
from megaft.models.tied_embedding import join_gradients
from megaft.weights.loading.causal_lm import CausalLM, context_limit, vocab_size
from megaft.weights.loading.memory_budget import agreed_memory_budget
from megaft.weights.loading.pretrained import (
    MODEL_SETTING,
    create_from,
    create_language_model,
    load_language_model,
    read_new_config,
)
from megaft.weights.loading.size_limit import MemoryBudget


class NatsModel(nn.Module):
    """A language model that returns the nats of its labels instead of logits."""

    def __init__(self, language_model: CausalLM, trial_model: CausalLM | None = None):
        """Wrap a model; `trial_model` is from `trials.trial_model_of`, if one has been created already."""
        super().__init__()
        self.language_model = language_model
        self.head = None
        if trials.head_is_linear(language_model, trial_model):
            layer: Any = language_model.get_output_embeddings()
            self.head = Head(layer, output_gradient=join_gradients(language_model.get_input_embeddings(), layer.weight))

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        labels: Int64[Tensor, "batch time"],
        document_ids: Int64[Tensor, "batch time"] | None = None,
        positions: Int64[Tensor, " scored"] | None = None,
    ) -> Float32[Tensor, ...]:
        """Return the nats of `labels`, which are already shifted by one.

        Args:
            input_ids: Tokens.
            labels: The next token of each; IGNORE_INDEX where it is not scored.
            document_ids: Document number of each token; attention and positions then stay within documents.
            positions: Positions of the flattened batch; return the nats of these labels instead of the sum, without
                gradients.
        """
        inside = {} if document_ids is None else self._within(document_ids)
        if self.head is None:
            logits = self.language_model(input_ids=input_ids, use_cache=False, **inside).logits
            nats = token_nats(logits, labels)
            return nats.sum() if positions is None else at_positions(nats.detach(), positions)
        hidden = self.language_model.base_model(input_ids=input_ids, use_cache=False, **inside).last_hidden_state
        return self.head(hidden, labels, positions)

    def _within(self, document_ids: Int64[Tensor, "batch time"]) -> dict[str, Tensor]:
        """Return the inputs of the model that keep attention and positions within documents."""
        inputs = {"position_ids": positions_within(document_ids)}
        return inputs | {"attention_mask": document_mask(document_ids)} if takes_masks(self.language_model) else inputs


def positions_within(document_ids: Int64[Tensor, "batch time"]) -> Int64[Tensor, "batch time"]:
    """Return position ids that restart at 0 in every document.

    Given these and no mask, transformers confines attention to each run of consecutive positions
    (masking_utils.find_packed_sequence_indices), in every attention implementation that it makes masks for.
    """
    steps = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    is_first = torch.ones_like(document_ids, dtype=torch.bool)
    is_first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return steps - torch.where(is_first, steps, 0).cummax(1).values


def build(config: ModelConfig, lora: LoraConfig, seed: int, engine_config: dict[str, Any] | None = None) -> CausalLM:
    """Return the model that a run starts from: loaded or new, with adapters, in fp32. Every rank calls this.

    Args:
        config: Source of the model.
        lora: Settings of the adapters.
        seed: Seed of new weights.
        engine_config: Configuration for deepspeed.initialize. At ZeRO stage 3 the model is built partitioned, in the
            engine's precision; one with adapters or from a GGUF file is partitioned later, by deepspeed.initialize.
    """
    is_gguf = config.path is not None and config.path.endswith(".gguf")
    if lora.rank or is_gguf or not is_stage_3(engine_config):
        return together(build_whole, config, lora, seed, agreed_memory_budget())
    if config.path is not None:
        with zero_init_context(engine_config, is_new=False):
            model = load_language_model(config.path, dropout=config.dropout)
    else:
        assert config.from_scratch is not None
        new_config = together(read_new_config, config.from_scratch, config.dropout)
        num_partitions, budget = parallel.world_size(), agreed_memory_budget()
        with zero_init_context(engine_config, is_new=True):
            model = create_from(new_config, config.from_scratch, seed, num_partitions, budget)
    return together(_prepared, model, config)


def build_whole(config: ModelConfig, lora: LoraConfig, seed: int, budget: MemoryBudget | None = None) -> CausalLM:
    """Return the unpartitioned model that a run starts from. A single rank may call this."""
    if config.path is not None:
        model = load_language_model(config.path, dropout=config.dropout)
    else:
        assert config.from_scratch is not None
        model = create_language_model(config.from_scratch, seed, config.dropout, budget)
    if lora.rank:
        add_adapters(model, lora, seed)
    return _prepared(model, config)


def _prepared(model: CausalLM, config: ModelConfig) -> CausalLM:
    """Return the model with faster operations, and with activation checkpointing if the settings enable it."""
    fuse(model)
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


def zero_init_context(
    engine_config: dict[str, Any] | None, *, is_new: bool, setting: str = MODEL_SETTING
) -> AbstractContextManager[None]:
    """Return a context in which models are built partitioned at ZeRO stage 3, and as usual at other stages."""
    if engine_config is None or not is_stage_3(engine_config):
        return nullcontext()
    from megaft.models import partitioned

    return partitioned.creating(engine_config) if is_new else partitioned.loading(engine_config, setting)


def require_fits(model: CausalLM, tokenizer, longest_input: int) -> None:
    """Refuse a tokenizer with more tokens than the model embeds, and inputs longer than its context.

    Raises:
        DataError: The tokenizer is too large.
        ConfigError: The input is too long.
    """
    if tokenizer.vocab_size > vocab_size(model):
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model embeds {vocab_size(model)}; "
            "use the tokenizer that the model was trained with."
        )
    limit = context_limit(model)
    if limit is not None and longest_input > limit:
        raise ConfigError(
            f"--data.context-length or --eval.context-length is {longest_input}, but the model has {limit} positions; "
            f"use {limit} or less."
        )


def architecture(model: CausalLM) -> str:
    """Return a hash of the trained parameters' names and shapes, which a checkpoint must match."""
    trained = {
        name: getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: the full shape of a partitioned parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return architecture_of(type(model).__name__, trained)


def architecture_of(class_name: str, shapes: dict[str, torch.Size]) -> str:
    """Return the architecture hash of a transformers class with trained parameters of these shapes."""
    trained = sorted((name, tuple(shape)) for name, shape in shapes.items())
    return f"{class_name} {blake2b(repr(trained).encode(), digest_size=8).hexdigest()}"
