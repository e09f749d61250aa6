"""Output layer of a language model, from hidden states to nats."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from megaft.models.linear_nats import LinearNats
from megaft.models.loss import VocabularyShard, at_positions, chunks, token_nats
from megaft.models.products import for_products, fp32_logits
from megaft.models.tied_embedding import OutputGradient


class Head(nn.Module):
    """The output layer of a language model, from hidden states to nats.

    It shares the parameters of the model's output layer, so DeepSpeed's ZeRO-3 hooks gather them here.
    """

    def __init__(
        self,
        output_layer: Any,
        vocabulary: VocabularyShard | None = None,
        output_gradient: OutputGradient | None = None,
    ):
        super().__init__()
        self.weight = output_layer.weight
        self.bias = getattr(output_layer, "bias", None)
        self.vocabulary = vocabulary
        self.output_gradient = output_gradient

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        labels: Int64[Tensor, "batch time"],
        positions: Int64[Tensor, " scored"] | None = None,
    ) -> Float32[Tensor, ...]:
        """Return the summed nats; or each label's at `positions` of the flattened batch, without gradients."""
        if positions is not None:
            return self._at(positions, hidden, labels)
        inputs = (hidden.flatten(0, 1), self.weight, self.bias, labels.flatten())
        return LinearNats.apply(*inputs, self.vocabulary, self.output_gradient)

    @torch.no_grad()
    def _at(self, positions: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        states, targets = (at_positions(tensor, positions) for tensor in (hidden, labels))
        nats = [torch.zeros(0, device=labels.device)]
        weight = self.weight if self.vocabulary is None else self.weight[: self.vocabulary.num_local]
        weight = for_products(weight)
        for chunk in chunks(len(targets), len(self.weight), labels.device):
            logits = fp32_logits(states[chunk], weight, self.bias)
            nats_of = token_nats if self.vocabulary is None else self.vocabulary.nats
            nats.append(nats_of(logits, targets[chunk]))
        return torch.cat(nats)
