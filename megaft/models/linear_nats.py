"""Fused output layer and cross-entropy, whose gradients are computed in the forward pass.

Each chunk of tokens takes three matrix products (its logits, the gradients of its hidden states and of the weight) and
one pass over the logits; those of all tokens never exist together.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from megaft.base import parallel
from megaft.data.samples import IGNORE_INDEX
from megaft.models import products
from megaft.models.compiled import compiled
from megaft.models.loss import VocabularyShard, chunks
from megaft.models.products import add_product, aligned, for_products, fp32_logits
from megaft.models.tied_embedding import OutputGradient


class LinearNats(torch.autograd.Function):
    """Summed nats of `labels` under softmax(hidden @ weight.T + bias).

    With a vocabulary sharded over ranks, each rank passes its rows; all get the same sum and gradient of `hidden`.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        labels: Int64[Tensor, " tokens"],
        vocabulary: VocabularyShard | None = None,
        output_gradient: OutputGradient | None = None,
    ) -> Float32[Tensor, ""]:
        """Sum the nats; save d nats / d input for each input that needs a gradient."""
        is_joined = output_gradient is not None and ctx.needs_input_grad[1] and output_gradient.claim()
        ctx.output_gradient = output_gradient if is_joined else None
        ctx.dtype = hidden.dtype
        hidden, weight = for_products(hidden), for_products(weight)
        shard = vocabulary or VocabularyShard(0, len(weight), is_sharded=False)
        token_chunks = chunks(len(labels), len(weight), labels.device)  # padding rows count: equal on all ranks
        num_rows, weight = len(weight), aligned(weight[: shard.num_local])
        gradients = Gradients(ctx.needs_input_grad, hidden, max(num_rows, len(weight)), bias)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for chunk in token_chunks:
            logits = fp32_logits(hidden[chunk], weight, bias)
            nats, grad_logits = nats_and_grad_logits(logits, labels[chunk], shard, hidden.dtype)
            total += nats
            gradients.add(grad_logits, hidden[chunk], weight, chunk)
            del logits, grad_logits  # before the next chunk's are allocated
        ctx.save_for_backward(*gradients.finish(num_rows, shard))
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Float32[Tensor, ""]):
        """Scale the saved gradients, in place: a second backward pass is not supported."""
        hidden, weight, bias = (None if grad is None else grad.mul_(grad_outputs[0]) for grad in ctx.saved_tensors)
        if ctx.output_gradient:
            ctx.output_gradient.put(weight)
            weight = None
        return (*(None if grad is None else grad.to(ctx.dtype) for grad in (hidden, weight, bias)), None, None, None)


class Gradients:
    """Gradients of the hidden states, and in fp32, as sums over chunks, of weight and bias; None if not needed."""

    def __init__(self, needed, hidden: Tensor, num_rows: int, bias: Tensor | None) -> None:
        fp32 = {"dtype": torch.float32, "device": hidden.device}
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros(num_rows, hidden.shape[1], **fp32) if needed[1] else None
        self.bias = torch.zeros(len(bias), **fp32) if bias is not None and needed[2] else None

    def add(self, grad_logits: Tensor, hidden: Tensor, weight: Tensor, chunk: slice) -> None:
        """Add the gradients of a chunk, from `grad_logits`, d nats / d logits."""
        if self.bias is not None:
            self.bias += grad_logits[:, : len(self.bias)].sum(0, dtype=torch.float32)
        if self.hidden is not None:
            torch.mm(grad_logits, weight, out=self.hidden[chunk])
        if self.weight is not None:
            add_product(self.weight[: len(weight)], grad_logits.T, hidden)

    def finish(self, num_rows: int, shard: VocabularyShard) -> tuple[Tensor | None, ...]:
        """Return the gradients: of `num_rows` rows, and of the hidden states summed over tensor-parallel ranks."""
        if shard.is_sharded and self.hidden is not None:
            parallel.sum_over_tensor_ranks(self.hidden)
        return self.hidden, None if self.weight is None else self.weight[:num_rows], self.bias


def nats_and_grad_logits(
    logits: Float32[Tensor, "tokens rows"], labels: Int64[Tensor, " tokens"], shard: VocabularyShard, dtype: torch.dtype
) -> tuple[Float32[Tensor, ""], Float[Tensor, "tokens rows"]]:
    """Return the summed nats and, in `dtype`, d nats / d logits: softmax minus one-hot, 0 where not scored.

    `logits` may be overwritten. Their columns beyond the vocabulary, if any, are 0 and have gradient 0.
    """
    size = shard.num_local
    if products.is_on_cuda(logits) and not shard.is_sharded:
        return _compiled()(logits, labels, size, dtype)
    entries = logits[:, :size]
    normalizer, target = shard.normalizer_and_target(entries, labels)
    scored = (labels != IGNORE_INDEX).unsqueeze(-1)
    is_local, columns = shard.local_columns(labels)
    grad_logits = entries.sub_(normalizer).exp_()
    grad_logits.scatter_add_(-1, columns, -is_local.to(grad_logits.dtype)).mul_(scored)
    return ((normalizer - target) * scored).sum(), logits.to(dtype)


def fusible_nats_and_grad_logits(
    logits: Tensor, labels: Tensor, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute `nats_and_grad_logits` without scatter and in-place operations, so that a compiler can fuse it."""
    entries = logits[:, :size]
    normalizer = entries.logsumexp(-1, keepdim=True)
    scored = (labels != IGNORE_INDEX).unsqueeze(-1)
    columns = labels.clamp_min(0).unsqueeze(-1)
    is_label = torch.arange(size, device=labels.device) == columns
    grad_logits = torch.where(scored, (entries - normalizer).exp() - is_label.float(), 0.0)
    nats = ((normalizer - entries.gather(-1, columns)) * scored).sum()
    return nats, F.pad(grad_logits, (0, logits.shape[1] - size)).to(dtype)


@cache
def _compiled():
    return compiled(fusible_nats_and_grad_logits)
