"""Generation with a megatron-core model that is sharded over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from megaft.base import parallel
from megaft.config.train import ModelConfig
from megaft.models.megatron import Attention, MegatronModel, build
from megaft.weights.loading.causal_lm import context_limit


class CachedShard:
    """This rank's shard of a model as a sampling.Decoder; each rank caches the keys and values of its own heads."""

    def __init__(self, model: MegatronModel) -> None:
        self.max_positions = context_limit(model)
        self.vocab_size: int = model.config.vocab_size
        self._model = model.eval()
        self._attentions = [module for module in model.modules() if isinstance(module, Attention)]

    def forward(self, token_ids: Sequence[int], num_past: int) -> Float[Tensor, " vocab"]:
        """Process tokens that follow the first `num_past`; return the logits after the last, the same on all ranks."""
        weight = self._model.output_layer().weight
        assert isinstance(weight, Tensor)
        if num_past == 0:
            for attention in self._attentions:
                attention.past = weight.new_empty(0), weight.new_empty(0)
        states = self._model(torch.tensor([token_ids], device=weight.device), past=num_past)
        shards = parallel.gather_over_tensor_ranks(F.linear(states[0, -1], weight))
        return shards.flatten()[: self.vocab_size]  # padding rows follow the last vocabulary entry


def load_cached_shard(source: str, dtype: torch.dtype, device: torch.device) -> CachedShard:
    """Load this rank's shard of a model, after `parallel.start_tensor_parallelism`.

    Raises:
        ConfigError: megatron-core does not support the model, or cannot shard it over this many ranks.
        DataError: The model is missing or cannot be read.
    """
    model = build(ModelConfig(path=source, backend="megatron"), seed=0)
    return CachedShard(model.to(dtype=dtype, device=device))
