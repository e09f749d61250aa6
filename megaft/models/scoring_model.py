"""A language model in evaluation: what each scored token costs, and whether it was the model's first choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from megaft.loss import IGNORE_INDEX, chunks, token_nats
from megaft.models.hugging_face import CausalLM, NatsModel
from megaft.models.last_layer import trunk


class ScoringModel(nn.Module):
    """A language model in evaluation: what each scored token costs, and whether it was the model's first choice."""

    def __init__(self, language_model: CausalLM, *, with_choices: bool = False, banned: Sequence[int] = ()) -> None:
        super().__init__()
        self.language_model = language_model.eval()
        head = NatsModel(language_model).head
        self.with_choices = with_choices
        self.trunk = trunk(language_model)
        self.head = ScoringHead(head.weight, head.bias)
        self.register_buffer("banned", torch.tensor(banned, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def forward(
        self, input_ids: Int64[Tensor, "batch time"], labels: Int64[Tensor, "batch time"]
    ) -> Float32[Tensor, "quantity batch time"]:
        """Return the nats of each label and, with choices, 1.0 where it is the model's first choice.

        Args:
            input_ids: Tokens, rows filled up on the right.
            labels: The token after each; IGNORE_INDEX where it is not scored, and both quantities are 0.0 there.
        """
        is_scored = labels != IGNORE_INDEX
        hidden = self.trunk(input_ids, is_scored)
        nats = self.head(hidden, labels[is_scored])
        quantities = torch.zeros(1 + self.with_choices, *labels.shape, device=labels.device)
        quantities[:, is_scored] = nats
        return quantities


class ScoringHead(nn.Module):
    def __init__(self, weight, bias):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, hidden: Float[Tensor, "scored width"], labels: Int64[Tensor, " scored"]):
        parts = [
            token_nats(F.linear(hidden[part], self.weight, self.bias), labels[part])[None]
            for part in chunks(len(labels), len(self.weight))
        ]
        return torch.cat([hidden.new_zeros(1, 0, dtype=torch.float32), *parts], dim=1)
