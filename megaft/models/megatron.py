"""megatron-core's GPT for a transformers configuration, sharded over tensor-parallel ranks, returning nats.

It runs on CUDA and on CPUs. Three parts are implemented here, because megatron-core's need CUDA or Transformer Engine:
attention (torch's fused kernel), its dropout's random numbers, and activation checkpointing. They keep replicated
weights equal on all ranks, make attention dropout differ between ranks, and leave the loss bit-identical when a layer
is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaft.base import parallel
from megaft.base.agreement import together
from megaft.base.checks import require
from megaft.base.untrusted import require_safe_files
from megaft.config.parallelism import Backend
from megaft.config.train import ModelConfig
from megaft.models.attention import document_mask
from megaft.models.head import Head
from megaft.models.hugging_face import architecture_of, positions_within
from megaft.models.loss import VocabularyShard
from megaft.weights.dimensions import MAX_RANKS
from megaft.weights.families import family_of, model_dimensions
from megaft.weights.layout import layout_of
from megaft.weights.loading.finite_weights import require_finite
from megaft.weights.loading.pretrained import set_dropout
from megaft.weights.new_weights import new_weights
from megaft.weights.parameters import Weights, load_config, shapes_of
from megaft.weights.reading import open_weights


class Attention(nn.Module):
    """torch's scaled-dot-product attention, with the interface of megatron-core's core attention."""

    def __init__(self, config: TransformerConfig, *_: Any, **__: Any) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.past: tuple[Tensor, Tensor] | None = None
        """Key-value cache of the tokens processed so far, during generation."""

    def forward(
        self,
        query: Float[Tensor, "time batch heads width"],
        key: Float[Tensor, "time batch groups width"],
        value: Float[Tensor, "time batch groups width"],
        attention_mask: Bool[Tensor, "batch 1 time time"] | None,
        **_: Any,
    ) -> Float[Tensor, "time batch width"]:
        """Return causal attention, or attention under the mask if there is one."""
        queries, keys, values = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if self.past is not None:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.past, (keys, values), strict=True))
            self.past = keys, values
        if attention_mask is not None:  # fused kernels take a mask or grouped queries, not both
            repeats = queries.shape[1] // keys.shape[1]
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        attend = partial(
            F.scaled_dot_product_attention,
            queries,
            keys,
            values,
            attn_mask=attention_mask,
            is_causal=attention_mask is None and queries.shape[2] > 1,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        attended = self._dropped(attend, query.device) if self.dropout and self.training else attend()
        return attended.permute(2, 0, 1, 3).flatten(2)

    def _dropped(self, attend: Callable[..., Tensor], device: torch.device) -> Tensor:
        """Attend with dropout. Every rank draws one number, so the default generators stay in step."""
        seed = int(torch.randint(2**48, ())) * MAX_RANKS + parallel.tensor_parallel_rank()
        # This device's generator only: torch.manual_seed and fork_rng handle all devices, at 0.5 ms of host per layer.
        generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return attend(dropout_p=self.dropout)
        finally:
            generator.set_state(state)


class MegatronModel(nn.Module):
    """This rank's shard of megatron-core's GPTModel, which returns last hidden states."""

    backend: Backend = "megatron"

    def __init__(self, config: Any, *, recompute: bool = False) -> None:
        """Create the modules with uninitialized weights.

        Args:
            config: transformers' configuration.
            recompute: Keep only each layer's input, and recompute the layer in the backward pass.

        Raises:
            ConfigError: megatron-core does not support the model, or cannot shard it over this many ranks.
        """
        super().__init__()
        self.config = config
        self.layout = layout_of(config)
        dims = self.layout.dims
        dims.require_shardable(parallel.tensor_parallel_size(), "--parallel.tensor-parallel-size")
        self.gpt = GPTModel(
            config=transformer_config(config),
            transformer_layer_spec=layer_spec(config, recompute=recompute),
            vocab_size=padded_vocab_size(dims.vocab_size),
            max_sequence_length=dims.num_positions,
            position_embedding_type="learned_absolute" if dims.has_position_embedding else "none",
            share_embeddings_and_output_weights=dims.is_tied,
        )
        self.inverse_frequencies = None if dims.has_position_embedding else rotary_frequencies(config)
        self.padding_id_without_gradient: int | None = None if family_of(config).trains_padding else config.pad_token_id
        """Padding token, for which transformers' embedding has no gradient; it may be the end-of-text token."""
        for name, parameter in self.gpt.named_parameters():
            rule = self.layout.rules[name]
            # DeepSpeed reads this attribute when it computes a norm.
            vars(parameter)["tensor_model_parallel"] = rule.axis is not None
            vars(parameter)["num_padding"] = (padded_vocab_size(rule.rows) - rule.rows) * config.hidden_size

    def output_layer(self) -> nn.Module:
        """Return the output layer, or the embedding if they are tied."""
        tied = self.gpt.embedding.word_embeddings
        return tied if self.config.tie_word_embeddings else self.gpt.output_layer

    def vocabulary(self) -> VocabularyShard:
        """Return this rank's vocabulary entries."""
        num_rows = padded_vocab_size(self.config.vocab_size) // parallel.tensor_parallel_size()
        begin = num_rows * parallel.tensor_parallel_rank()
        end = max(begin, min(begin + num_rows, self.config.vocab_size))
        return VocabularyShard(begin, end, is_sharded=True)

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        document_ids: Int64[Tensor, "batch time"] | None = None,
        past: int = 0,
    ) -> Float[Tensor, "batch time width"]:
        """Return the last hidden states.

        Args:
            input_ids: Tokens.
            document_ids: Document number of each token; attention and positions then stay within documents.
            past: Number of tokens already in the key-value cache.
        """
        time = input_ids.shape[1]
        if document_ids is None:
            positions, mask = torch.arange(past, past + time, device=input_ids.device).expand_as(input_ids), None
        else:
            positions, mask = positions_within(document_ids), document_mask(document_ids)
        states = self.gpt.embedding(input_ids, positions)
        if self.padding_id_without_gradient is not None:
            is_untrained = input_ids.eq(self.padding_id_without_gradient).T.unsqueeze(-1)
            states = torch.where(is_untrained, states.detach(), states)
        states = self.gpt.decoder(states, mask, rotary_pos_emb=self._angles(past, time, input_ids.device))
        return states.transpose(0, 1)

    def _angles(self, past: int, time: int, device: torch.device) -> Float32[Tensor, "time 1 1 width"] | None:
        """Return rotary angles (Su et al. 2021). They need not restart per document: only differences matter."""
        if self.inverse_frequencies is None:
            return None
        # Stays on the device after the first call. Not a buffer: an engine in bf16 would round it.
        self.inverse_frequencies = self.inverse_frequencies.to(device)
        steps = torch.arange(past, past + time, device=device, dtype=torch.float32)
        angles = torch.outer(steps, self.inverse_frequencies)
        return torch.cat([angles, angles], -1)[:, None, None]


class MegatronNats(nn.Module):
    """A megatron-core model that returns the nats of its labels, the same on all tensor-parallel ranks."""

    def __init__(self, language_model: MegatronModel) -> None:
        super().__init__()
        self.language_model = language_model
        self.head = Head(language_model.output_layer(), vocabulary=language_model.vocabulary())

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        labels: Int64[Tensor, "batch time"],
        document_ids: Int64[Tensor, "batch time"] | None = None,
        positions: Int64[Tensor, " scored"] | None = None,
    ) -> Float32[Tensor, ...]:
        """Return the nats of `labels`, like hugging_face.NatsModel."""
        return self.head(self.language_model(input_ids, document_ids), labels, positions)


def padded_vocab_size(vocab_size: int) -> int:
    """Return the embedding's rows, padded to a multiple of the tensor-parallel size."""
    return vocab_size + -vocab_size % parallel.tensor_parallel_size()


def transformer_config(config: Any) -> TransformerConfig:
    """Return megatron-core's configuration for a transformers configuration.

    Raises:
        ConfigError: The model has a feature that megatron-core, as built here, does not support.
    """
    family, dims = family_of(config), model_dimensions(config)
    family.require_modules(config)
    require(
        dims.activation in family.activations,
        f"the model's activation is {dims.activation}; --model.backend megatron supports "
        f"{', '.join(family.activations)}; use --model.backend hugging-face.",
    )
    return TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.width,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_groups,
        kv_channels=dims.head_width,
        ffn_hidden_size=dims.inner_width,
        gated_linear_unit=dims.is_gated,
        activation_func=ACTIVATIONS[dims.activation],
        normalization=dims.norm,
        layernorm_epsilon=getattr(config, family.epsilon),
        hidden_dropout=dims.dropout,
        attention_dropout=getattr(config, family.attention_dropout),
        add_bias_linear=dims.has_bias,
        add_qkv_bias=dims.has_qkv_bias,
        tensor_model_parallel_size=parallel.tensor_parallel_size(),
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


ACTIVATIONS = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""Activation functions of MLP layers, by transformers' names."""


def rotary_frequencies(config: Any) -> Float32[Tensor, " half_width"]:
    """Return the rotary embedding's inverse frequencies, with the model's scaling, by transformers' formulas."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    kinds = ("default", "linear", "llama3")
    require(
        rotary.rope_type in kinds and rotary.attention_scaling == 1,
        f"the model's rope_type is {rotary.rope_type}; --model.backend megatron supports {', '.join(kinds)}; "
        "use --model.backend hugging-face.",
    )
    inverse = rotary.inv_freq
    assert torch.is_tensor(inverse)
    return inverse.float()


def layer_spec(config: Any, *, recompute: bool) -> ModuleSpec:
    """Return the layer specification: megatron-core's modules, with this file's attention."""
    spec: Any = get_gpt_layer_local_spec(normalization=model_dimensions(config).norm)
    spec.submodules.self_attention.submodules.core_attention = Attention
    if recompute:
        spec.module = RecomputedLayer
    return spec


class RecomputedLayer(TransformerLayer):
    """A layer with activation checkpointing: the backward pass recomputes it, with the same dropout, from its input."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        if not self.training:
            return super().forward(hidden_states, *args, **kwargs)
        # A positional tensor tells the checkpoint which device's random state to save.
        return checkpoint(super().forward, hidden_states, *args, use_reentrant=False, **kwargs)


def build(settings: ModelConfig, seed: int, engine_config: dict[str, Any] | None = None) -> MegatronModel:
    """Return this rank's shard of the model that a run starts from, loaded or new.

    Args:
        settings: Source of the model.
        seed: Seed of new weights.
        engine_config: Configuration for deepspeed.initialize. At ZeRO stage 3 the shard is built partitioned.

    Raises:
        ConfigError: megatron-core does not support the model, or cannot shard it over this many ranks.
        DataError: A rank cannot read the model; raised on every rank.
    """
    weights = together(initial_weights, settings, seed)
    set_dropout(weights.config, settings.dropout)
    with zero_init_context(engine_config):
        model = MegatronModel(weights.config, recompute=settings.activation_checkpointing)
    where = f"--model.path is {settings.path}; "
    together(fill, model, lambda name: require_finite(name, weights.read(name), where))
    return model


def initial_weights(settings: ModelConfig, seed: int) -> Weights:
    """Return the unsharded weights that a run starts from, by transformers' names: stored, or new from the seed."""
    if settings.path is not None:
        return open_weights(settings.path)
    assert settings.from_scratch is not None
    require_safe_files("--model.from-scratch", settings.from_scratch)
    return new_weights(load_config(settings.from_scratch), seed)


def architecture(model: MegatronModel) -> str:
    """Return the architecture hash of the same model in transformers, so either backend resumes the other's runs."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(model.config)]
    return architecture_of(model_class.__name__, shapes_of(model.config))


def zero_init_context(engine_config: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """Return a context in which modules are built partitioned at ZeRO stage 3, and as usual at other stages."""
    if engine_config is None or engine_config.get("zero_optimization", {}).get("stage") != 3:
        return nullcontext()
    import deepspeed

    mpu = parallel.mpu()
    assert mpu is not None
    data = mpu.get_data_parallel_group()
    return deepspeed.zero.Init(data_parallel_group=data, config_dict_or_path=engine_config, mpu=mpu)


@torch.no_grad()
def fill(model: MegatronModel, read: Callable[[str], Tensor]) -> None:
    """Set every parameter, one at a time.

    Args:
        model: This rank's shard; under ZeRO-3 its parameters are partitioned, and each rank fills its partition.
        read: Returns a parameter by transformers' name.
    """
    layout, size, rank = model.layout, parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    for name, parameter in model.gpt.named_parameters():
        values = layout.local(name, [read(source) for source in layout.rules[name].sources], size, rank)
        _copy_into(parameter, values)


def _copy_into(parameter: Any, values: Tensor) -> None:
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(values)
        return
    partition = parameter.ds_tensor
    begin = parallel.data_parallel_rank() * partition.ds_numel
    local = values.flatten()[begin : begin + partition.ds_numel]
    partition.view(-1)[: len(local)].copy_(local)
