"""Gradient of a weight that is both the embedding and the output layer, added up in one fp32 tensor.

torch makes a second gradient of the same size for the embedding, mostly zeros, and a third one for the sum. Here the
output layer's gradient waits for the embedding's backward pass, the last one, which adds the rows of its tokens.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn


class OutputGradient:
    """Gradient of the output layer, from its own backward pass until the embedding's."""

    def __init__(self) -> None:
        self._is_expected = False
        self._gradient: Tensor | None = None

    def expect_embedding(self) -> None:
        """Note that the embedding took part in a forward pass, so that its backward pass will follow."""
        self._is_expected = True

    def claim(self) -> bool:
        """Return True, once in a forward pass, if the output layer has to put its gradient here."""
        was_expected, self._is_expected = self._is_expected, False
        return was_expected

    def put(self, gradient: Float32[Tensor, "vocab width"]) -> None:
        """Leave the output layer's gradient, in its backward pass. The whole pass fails if no embedding takes it."""
        self._gradient = gradient
        torch.autograd.Variable._execution_engine.queue_callback(self._require_taken)

    def _require_taken(self) -> None:
        was_left = self.take() is not None
        assert not was_left, "the embedding took no part in the backward pass of its output layer"

    def take(self) -> Float32[Tensor, "vocab width"] | None:
        """Return the output layer's gradient, once; None if there is none."""
        gradient, self._gradient = self._gradient, None
        return gradient


def join_gradients(embedding: Any, weight: nn.Parameter) -> OutputGradient | None:
    """Let an embedding add its gradient to that of an output layer, if `weight` belongs to both; None if it cannot."""
    if type(embedding) is not nn.Embedding or embedding.weight is not weight:
        return None
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        return None
    output_gradient: Any = OutputGradient()
    embedding.output_gradient = output_gradient
    embedding.forward = MethodType(embed, embedding)
    return output_gradient


def embed(embedding: Any, input: Int64[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
    """Return the rows of the tokens `input`, as `nn.Embedding` does."""
    if not (torch.is_grad_enabled() and embedding.weight.requires_grad):
        return nn.Embedding.forward(embedding, input)
    embedding.output_gradient.expect_embedding()
    return EmbeddingRows.apply(embedding.weight, input, embedding.padding_idx, embedding.output_gradient)


class EmbeddingRows(torch.autograd.Function):
    """Rows of a weight, whose gradient is added to the output layer's."""

    @staticmethod
    def forward(
        ctx,
        weight: Float[Tensor, "vocab width"],
        ids: Int64[Tensor, "batch time"],
        padding_id: int | None,
        output_gradient: OutputGradient,
    ) -> Float[Tensor, "batch time width"]:
        """Return the rows of the tokens; the gradient does not count those of `padding_id`."""
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype, ctx.padding_id = weight.shape, weight.dtype, padding_id
        ctx.output_gradient = output_gradient
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, *grad_outputs: Float[Tensor, "batch time width"]):
        """Return the sum of both gradients, in the dtype of the weight."""
        (ids,) = ctx.saved_tensors
        rows = grad_outputs[0].flatten(0, -2).float()
        if ctx.padding_id is not None:
            rows = rows * (ids.flatten() != ctx.padding_id).unsqueeze(-1)
        total = ctx.output_gradient.take()
        if total is None:
            total = rows.new_zeros(ctx.shape)
        return total.index_add_(0, ids.flatten(), rows).to(ctx.dtype), None, None, None
