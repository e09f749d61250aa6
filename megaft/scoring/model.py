"""Scoring model: nats of each scored token, and whether it was the model's greedy choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from megaft.base import parallel
from megaft.base.agreement import together
from megaft.config.train import ModelConfig
from megaft.models import trials
from megaft.models.backend import Backend, backend_of_model
from megaft.models.fused import fuse
from megaft.models.hugging_face import NatsModel, zero_init_context
from megaft.models.loss import VocabularyShard, at_positions, chunks, token_nats
from megaft.models.parameters import count
from megaft.models.products import for_products, fp32_logits, has_onednn
from megaft.scoring.batch import ScoringBatch, to_device
from megaft.scoring.last_layer import AnyTrunk, GPT2Trunk, LlamaTrunk, fast_trunk
from megaft.scoring.packed import PackedLinear, pack_linears
from megaft.weights.families import FAMILIES
from megaft.weights.loading.causal_lm import CausalLM, context_limit, vocab_size
from megaft.weights.loading.pretrained import load_language_model


class ScoringModel(nn.Module):
    """A language model in evaluation mode that returns the nats of labels and whether each was the greedy choice."""

    def __init__(
        self,
        language_model: CausalLM,
        *,
        with_greedy: bool = False,
        banned: Sequence[int] = (),
        trial_model: CausalLM | None = None,
    ) -> None:
        """Wrap a model; `trial_model` is from `trials.trial_model_of`, if one has been created already."""
        super().__init__()
        self.language_model = language_model.eval()
        self.trunk, output_layer, vocabulary = _split_off_head(language_model, trial_model)
        self.head = ScoringHead(output_layer, with_greedy, banned, vocabulary)

    def pack(self) -> None:
        """Pack the weight matrices for inference on CPU, if the architecture is supported."""
        if isinstance(self.trunk, GPT2Trunk | LlamaTrunk):
            assert self.head.weight is not None
            self.head.packed = PackedLinear(self.head.weight, self.head.bias)
            if isinstance(self.trunk, GPT2Trunk):
                self.trunk.last.pack()
            pack_linears(self.trunk)

    @torch.no_grad()
    def forward(self, batch: ScoringBatch) -> Float32[Tensor, "quantity scored"]:
        """Return the nats of each scored label, row by row, and, if `with_greedy`, 1.0 if its logit is the largest."""
        return self.head(self.trunk(batch), batch.targets, batch.is_first)


class ScoringHead(nn.Module):
    """The output layer, computed one chunk of tokens at a time.

    It shares the parameters of the model's output layer, so ZeRO-3's hooks gather them here.
    """

    def __init__(
        self,
        output_layer: nn.Module | None,
        with_greedy: bool,
        banned: Sequence[int],
        vocabulary: VocabularyShard | None = None,
    ):
        super().__init__()
        self.vocabulary = vocabulary
        self.weight: Any = None if output_layer is None else output_layer.weight
        self.bias: Any = getattr(output_layer, "bias", None)
        self.packed: PackedLinear | None = None
        self.with_greedy = with_greedy
        self.banned = np.array(banned, np.int64)

    def forward(
        self,
        states: Float[Tensor, "scored width"],
        labels: Int64[Tensor, " scored"],
        is_first: Bool[np.ndarray, " scored"],
    ) -> Float32[Tensor, "quantity scored"]:
        """Return the quantities of ScoringModel; `banned` tokens cannot be the greedy choice where `is_first`."""
        num_logits = states.shape[1] if self.weight is None else len(self.weight)
        quantities = torch.zeros(1 + self.with_greedy, len(labels), device=labels.device)
        weight = None if self.weight is None else self._entries(self.weight)
        for chunk in chunks(len(labels), num_logits, labels.device):
            logits = self._logits(states[chunk], weight)
            nats = self.vocabulary.nats if self.vocabulary else token_nats
            quantities[0, chunk] = nats(logits, labels[chunk])
            if self.with_greedy:
                quantities[1, chunk] = (self._greedy_ids(logits, is_first[chunk]) == labels[chunk]).float()
        return quantities

    def _entries(self, weight: Tensor) -> Tensor:
        """Return the rows of the vocabulary, without padding, in the dtype of their products."""
        return for_products(weight if self.vocabulary is None else weight[: self.vocabulary.num_local])

    def _logits(self, states: Tensor, weight: Tensor | None) -> Tensor:
        if self.packed is not None:
            return self.packed(states)
        return states if weight is None else fp32_logits(states, weight, self.bias)

    def _greedy_ids(self, logits: Tensor, is_first: np.ndarray) -> Tensor:
        shard = self.vocabulary or VocabularyShard(0, logits.shape[-1], is_sharded=False)
        greedy_ids = shard.greedy_ids(logits)
        if len(self.banned) and is_first.any():
            rows = to_device(np.flatnonzero(is_first), logits.device)
            banned = self.banned[(self.banned >= shard.begin) & (self.banned < shard.end)] - shard.begin
            allowed = logits.index_select(0, rows).index_fill_(-1, to_device(banned, logits.device), -torch.inf)
            greedy_ids.index_copy_(0, rows, shard.greedy_ids(allowed))
        return greedy_ids


class MegatronTrunk(nn.Module):
    """A megatron-core model without its output layer, computed at all positions, on each tensor-parallel rank."""

    def __init__(self, language_model: Any):
        super().__init__()
        self.language_model = language_model

    def forward(self, batch: ScoringBatch) -> Float[Tensor, "scored width"]:
        """Return the hidden states of the scored positions, row by row."""
        return batch.select(self.language_model(batch.input_ids))


class LogitsTrunk(nn.Module):
    """A complete model, for families that scale or cap their logits."""

    def __init__(self, language_model: CausalLM):
        super().__init__()
        self.language_model = language_model
        self.supports_logits_to_keep = trials.supports_logits_to_keep(language_model)

    def forward(self, batch: ScoringBatch) -> Float[Tensor, "scored vocab"]:
        """Return the logits of the scored positions, row by row, computing only columns that some row scores."""
        inputs = {"input_ids": batch.input_ids, "use_cache": False}
        if not self.supports_logits_to_keep:
            return batch.select(self.language_model(**inputs).logits)
        columns = np.flatnonzero(batch.is_scored.any(0))
        positions = np.flatnonzero(batch.is_scored[:, columns])
        columns, positions = (to_device(array, batch.input_ids.device) for array in (columns, positions))
        return at_positions(self.language_model(**inputs, logits_to_keep=columns).logits, positions)


def _split_off_head(
    language_model: CausalLM, trial_model: CausalLM | None
) -> tuple[nn.Module, nn.Module | None, VocabularyShard | None]:
    """Return the trunk, the output layer (None if the trunk returns logits) and the output layer's vocabulary shard."""
    if backend_of_model(language_model) == "megatron":
        return MegatronTrunk(language_model), language_model.output_layer(), language_model.vocabulary()
    output_layer = language_model.get_output_embeddings()
    if type(output_layer) is nn.Linear and (trunk := fast_trunk(language_model)):
        return trunk, output_layer, None
    if NatsModel(language_model, trial_model=trial_model).head is not None:
        return AnyTrunk(language_model), output_layer, None
    return LogitsTrunk(language_model), None, None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A loaded ScoringModel with the limits that batching needs; called like the model."""

    model: Callable[[ScoringBatch], Tensor]
    head: ScoringHead
    config: Any
    """transformers' configuration of the language model."""
    num_parameters: int
    context_limit: int | None
    vocab_size: int

    def __call__(self, batch: ScoringBatch) -> Float32[Tensor, "quantity scored"]:
        """Return the quantities of ScoringModel. If it is partitioned, every rank calls this with equal shapes."""
        with torch.no_grad():  # around the engine too, which otherwise expects a backward pass
            return self.model(batch)

    def configure(self, *, with_greedy: bool, banned: Sequence[int] = ()) -> Scorer:
        """Set which quantities later calls return, and return this scorer.

        Args:
            with_greedy: Return a second quantity, 1.0 if the label's logit is the largest.
            banned: Token ids that cannot be the greedy choice at the first scored position of a row.
        """
        self.head.with_greedy = with_greedy
        self.head.banned = np.array(banned, np.int64)
        return self


def load_scoring_model(
    source: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    backend: Backend = "hugging-face",
    is_partitioned: bool = False,
) -> Scorer:
    """Load a model for scoring; it returns nats only, until `configure` adds greedy choices.

    Args:
        source: Hub name, folder or GGUF file.
        dtype: Dtype of the model's computation; cross-entropy is always in float32.
        device: Device of the computation.
        backend: Model implementation. For megatron-core, call `parallel.start_tensor_parallelism` first.
        is_partitioned: Partition every weight over the data-parallel ranks with DeepSpeed's ZeRO-3. Only rank 0 maps
            the weight files of a transformers model; a GGUF file is first unpacked in the host memory of every rank.

    Raises:
        ConfigError: megatron-core does not support the model, or cannot shard it over this many ranks.
        DataError: The model is missing, cannot be read or is not a causal language model; raised on every rank.
    """
    if backend == "megatron":
        language_model = _load_megatron(source, dtype, is_partitioned)
        model = ScoringModel(language_model)
    else:
        language_model = (
            _load_partitioned(source, dtype)
            if is_partitioned
            else together(load_language_model, source, dtype, None, "--model")
        )
        model = together(_tested_model, language_model)
    num_parameters = count(language_model.parameters())
    if has_onednn(dtype, device) and not is_partitioned:
        model.pack()
    return Scorer(
        model=_engine(model.to(device), dtype) if is_partitioned else model.to(device),
        head=model.head,
        config=language_model.config,
        num_parameters=num_parameters,
        context_limit=context_limit(language_model),
        vocab_size=vocab_size(language_model),
    )


def _tested_model(language_model: CausalLM) -> ScoringModel:
    """Return the scoring model of a language model after trials of its causality and batch invariance."""
    with trials.trial_model_of(language_model) as trial_model:
        trials.require_language_model(language_model, trial_model)
    fuse(language_model)
    return ScoringModel(language_model, trial_model=trial_model)


def _load_megatron(source: str, dtype: torch.dtype, is_partitioned: bool) -> CausalLM:
    from megaft.models import megatron

    engine_config = _deepspeed_config(dtype) if is_partitioned else None
    model = megatron.build(ModelConfig(path=source, backend="megatron"), seed=0, engine_config=engine_config)
    return model if is_partitioned else model.to(dtype)


def _load_partitioned(source: str, dtype: torch.dtype) -> CausalLM:
    if not source.endswith(".gguf"):
        with zero_init_context(_deepspeed_config(dtype), is_new=False, setting="--model"):
            return load_language_model(source, dtype, setting="--model")
    import deepspeed

    # Loaded outside ZeRO's hooks, then partitioned.
    language_model = together(load_language_model, source, dtype, None, "--model")
    deepspeed.zero.Init(module=language_model, config_dict_or_path=_deepspeed_config(dtype))
    return language_model


def _engine(model: ScoringModel, dtype: torch.dtype) -> Callable[[ScoringBatch], Tensor]:
    import deepspeed

    engine = deepspeed.initialize(model=model, config=_deepspeed_config(dtype), mpu=parallel.mpu())[0]
    engine.eval()
    return engine


LIVE_PARAMETERS = 300_000_000
"""Parameters that a rank may gather beyond its own partition: two layers of 8.3 B. DeepSpeed's default is 10^9."""


def _deepspeed_config(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires it, but scoring does not use it
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": LIVE_PARAMETERS,
            "stage3_max_reuse_distance": LIVE_PARAMETERS,
        },
        "bf16": {"enabled": dtype is torch.bfloat16},
    }


ACTIVATION_BYTES = 8 * 2**30
"""Memory budget of a CUDA device for the activations of a layer."""

CPU_TOKENS = 2048
"""Batch size in tokens below which malloc reuses memory for activations, measured with GPT-2 124M and SmolLM2-135M."""

KNOWN_HEADS = {*FAMILIES, "qwen3"}
"""Model types whose logits are computed in chunks, never all at once."""


def tokens_per_batch(model_config: Any, context_length: int, device_type: str, dtype: torch.dtype) -> int:
    """Return the largest number of tokens in a forward pass, at least one row."""
    if device_type == "cpu":
        return max(context_length, CPU_TOKENS)
    config = model_config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    num_values = 8 * config.hidden_size + 4 * inner
    if config.model_type not in KNOWN_HEADS:
        num_values += 2 * config.vocab_size
    return max(context_length, ACTIVATION_BYTES // (num_values * dtype.itemsize))
