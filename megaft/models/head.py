"""Output layer of a language model, from hidden states to nats."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from megaft.data.samples import IGNORE_INDEX
from megaft.models.linear_nats import LinearNats
from megaft.models.loss import VocabularyShard, chunks, token_nats
from megaft.models.products import fp32_logits


class Head(nn.Module):
    """The output layer of a language model, from hidden states to nats.

    It shares the parameters of the model's output layer, so DeepSpeed's ZeRO-3 hooks gather them here.
    """

    def __init__(self, output_layer: Any, vocabulary: VocabularyShard | None = None):
        super().__init__()
        self.weight = output_layer.weight
        self.bias = getattr(output_layer, "bias", None)
        self.vocabulary = vocabulary

    def forward(
        self, hidden: Float[Tensor, "batch time width"], labels: Int64[Tensor, "batch time"], per_token: bool = False
    ) -> Float32[Tensor, ...]:
        """Return the summed nats; with `per_token`, each label's nats (0.0 if not scored), without gradients."""
        if per_token:
            return self._per_token(hidden, labels)
        return LinearNats.apply(hidden.flatten(0, 1), self.weight, self.bias, labels.flatten(), self.vocabulary)

    @torch.no_grad()
    def _per_token(self, hidden: Tensor, labels: Tensor) -> Tensor:
        nats = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
        scored = labels != IGNORE_INDEX
        flat, targets = hidden[scored], labels[scored]  # the head runs on scored positions only
        chunk_nats = [
            self._nats(flat[chunk], targets[chunk]) for chunk in chunks(len(targets), len(self.weight), labels.device)
        ]
        nats[scored] = torch.cat([nats.new_zeros(0), *chunk_nats])
        return nats

    def _nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.vocabulary is None:
            return token_nats(fp32_logits(hidden, self.weight, self.bias), labels)
        weight = self.weight[: self.vocabulary.end - self.vocabulary.begin]
        return self.vocabulary.nats(fp32_logits(hidden, weight, self.bias), labels)
