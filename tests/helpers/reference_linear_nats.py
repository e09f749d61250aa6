"""Reference for megaft's LinearNats: the plain chunked form, one product and one sum a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megaft.base import parallel
from megaft.data.samples import IGNORE_INDEX
from megaft.models.loss import VocabularyShard, chunks


class ReferenceLinearNats(torch.autograd.Function):
    """Summed nats of `labels` under softmax(hidden @ weight.T + bias); gradients are computed in the forward pass.

    With a vocabulary sharded over ranks, each rank passes its rows; all get the same sum and gradient of `hidden`.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        vocabulary: VocabularyShard | None = None,
        output_gradient: object = None,
    ) -> Tensor:
        """Sum the nats; save d nats / d input for each input that needs a gradient."""
        shard = vocabulary or VocabularyShard(0, len(weight), is_sharded=False)
        grads = _zero_gradients(ctx.needs_input_grad, hidden, weight, bias)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        token_chunks = chunks(len(labels), len(weight), labels.device)  # padding rows count: equal on all ranks
        weight = weight[: shard.end - shard.begin]
        for chunk in token_chunks:
            logits = F.linear(hidden[chunk], weight, bias).float()
            log_normalizer, target = shard.normalizer_and_target(logits, labels[chunk])
            scored = (labels[chunk] != IGNORE_INDEX).unsqueeze(-1)
            total += ((log_normalizer - target) * scored).sum()
            if any(ctx.needs_input_grad):
                # d nats / d logits is softmax minus one-hot.
                grad_logits = logits.sub_(log_normalizer).exp_()
                is_local, columns = shard.local_columns(labels[chunk])
                grad_logits.scatter_add_(-1, columns, -is_local.to(grad_logits.dtype)).mul_(scored)
                _accumulate(grads, grad_logits, hidden[chunk], weight, chunk)
        if shard.is_sharded and grads[0] is not None:
            parallel.sum_over_tensor_ranks(grads[0])
        ctx.save_for_backward(*grads)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        """Scale the saved gradients."""
        return (
            *(None if grad is None else (grad * grad_outputs[0]).to(ctx.dtype) for grad in ctx.saved_tensors),
            None,
            None,
            None,
        )


def _zero_gradients(needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Return zero gradients; those of weight and bias are in fp32, because they are summed over chunks."""
    return [
        torch.zeros_like(hidden) if needed[0] else None,
        torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None,
        torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None,
    ]


def _accumulate(grads: list[Tensor | None], grad_logits: Tensor, hidden: Tensor, weight: Tensor, chunk: slice) -> None:
    grad_hidden, grad_weight, grad_bias = grads
    if grad_bias is not None:
        grad_bias += grad_logits.sum(0)
    grad_logits = grad_logits.to(hidden.dtype)
    if grad_hidden is not None:
        torch.mm(grad_logits, weight, out=grad_hidden[chunk])
    if grad_weight is not None:
        grad_weight[: grad_logits.shape[1]] += grad_logits.T @ hidden
