"""Cross-entropy in nats from hidden states, in chunks, without materializing the full logits.

The last layer's logits are the largest tensor of a language model (GPT-2-XL at 1024 tokens: 0.2 GiB per sequence
in fp32, and as much again for their gradient). They are computed one chunk of tokens at a time, and in training their
gradient is computed in the same pass, so neither is ever materialized, and the head's weight, which ZeRO-3 partitions,
is gathered only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from megaft.base import parallel
from megaft.base.hardware import CHUNK_BYTES
from megaft.data.samples import IGNORE_INDEX


def token_nats(logits: Float[Tensor, "... vocab"], labels: Int64[Tensor, ...]) -> Float32[Tensor, ...]:
    """Return the cross-entropy of each label; the reference for the chunked and sharded versions below.

    Args:
        logits: Scores in any float dtype; position t predicts labels[..., t].
        labels: Already shifted by one. IGNORE_INDEX marks a token that is not scored.

    Returns:
        Nats, in float32, since bf16 is too coarse to sum a document; 0.0 at IGNORE_INDEX.

    Raises:
        IndexError: A label is outside the vocabulary.
    """
    flat = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view(labels.shape)


def chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Split the tokens into chunks whose fp32 logits stay within CHUNK_BYTES."""
    tokens = max(1, CHUNK_BYTES[device.type] // (4 * vocab_size))
    return [slice(begin, begin + tokens) for begin in range(0, num_tokens, tokens)]


class VocabularyShard(NamedTuple):
    """Vocabulary entries [begin, end) whose logits this rank computes."""

    begin: int
    end: int
    is_sharded: bool
    """True if sharded over tensor-parallel ranks; the layer's rows from `end - begin` on are then padding."""

    def normalizer_and_target(
        self, logits: Float32[Tensor, "tokens entries"], labels: Int64[Tensor, " tokens"]
    ) -> tuple[Float32[Tensor, "tokens 1"], Float32[Tensor, "tokens 1"]]:
        """Return the log-sum-exp over the whole vocabulary and the label's logit; the same on all ranks."""
        is_local, columns = self.local_columns(labels)
        local = torch.stack([logits.logsumexp(-1), (logits.gather(-1, columns) * is_local).squeeze(-1)])
        shards = parallel.gather_over_tensor_ranks(local) if self.is_sharded else local.unsqueeze(0)
        normalizers, targets = shards.unbind(1)
        return normalizers.logsumexp(0).unsqueeze(-1), targets.sum(0).unsqueeze(-1)

    def nats(
        self, logits: Float[Tensor, "tokens entries"], labels: Int64[Tensor, " tokens"]
    ) -> Float32[Tensor, " tokens"]:
        """Return the cross-entropy of each label over the whole vocabulary; the same on all ranks."""
        normalizer, target = self.normalizer_and_target(logits.float(), labels)
        return (normalizer - target).squeeze(-1)

    def greedy_ids(self, logits: Float[Tensor, "tokens entries"]) -> Int64[Tensor, " tokens"]:
        """Return the greedy choice, the argmax over the whole vocabulary (the first of ties); the same on all ranks."""
        columns = logits.argmax(-1, keepdim=True)
        largest, token_ids = logits.gather(-1, columns).squeeze(-1), columns.squeeze(-1) + self.begin
        if not self.is_sharded:
            return token_ids
        best_rank = parallel.gather_over_tensor_ranks(largest).argmax(0, keepdim=True)
        return parallel.gather_over_tensor_ranks(token_ids).gather(0, best_rank).squeeze(0)

    def local_columns(
        self, labels: Int64[Tensor, " tokens"]
    ) -> tuple[Bool[Tensor, "tokens 1"], Int64[Tensor, "tokens 1"]]:
        """Return a mask of the labels in this shard, and their columns in its logits; 0 for labels elsewhere."""
        labels = labels.unsqueeze(-1)
        is_local = (labels >= self.begin) & (labels < self.end) if self.is_sharded else labels >= 0
        return is_local, (labels - self.begin) * is_local


class LinearNats(torch.autograd.Function):
    """Summed nats of `labels` under softmax(hidden @ weight.T + bias); gradients are computed in the forward pass.

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
    ) -> Float32[Tensor, ""]:
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
    def backward(ctx, *grad_outputs: Float32[Tensor, ""]):
        """Scale the saved gradients."""
        return (
            *(None if grad is None else (grad * grad_outputs[0]).to(ctx.dtype) for grad in ctx.saved_tensors),
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


class Head(nn.Module):
    """The output layer of a language model, from hidden states to nats.

    It shares the parameters of the model's output layer, so DeepSpeed's ZeRO-3 hooks gather them here.
    """

    def __init__(self, output_layer: Any, cross_entropy: str = "chunked", vocabulary: VocabularyShard | None = None):
        super().__init__()
        self.weight = output_layer.weight
        self.bias = getattr(output_layer, "bias", None)
        self.vocabulary = vocabulary
        self.liger = _liger() if cross_entropy == "liger" else None

    def forward(
        self, hidden: Float[Tensor, "batch time width"], labels: Int64[Tensor, "batch time"], per_token: bool = False
    ) -> Float32[Tensor, ...]:
        """Return the summed nats; with `per_token`, each label's nats (0.0 if not scored), without gradients."""
        if per_token:
            return self._per_token(hidden, labels)
        flat = hidden.flatten(0, 1)
        if self.liger is not None:
            return self.liger(self.weight, flat, labels.flatten(), self.bias)
        return LinearNats.apply(flat, self.weight, self.bias, labels.flatten(), self.vocabulary)

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
            return token_nats(F.linear(hidden, self.weight, self.bias), labels)
        weight = self.weight[: self.vocabulary.end - self.vocabulary.begin]
        return self.vocabulary.nats(F.linear(hidden, weight, self.bias), labels)


def _liger():
    from megaft.base.errors import ConfigError

    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise ConfigError(
            "--model.cross-entropy is liger, but liger-kernel is not installed; install megaft[fast]."
        ) from error
    if not torch.cuda.is_available():
        raise ConfigError("--model.cross-entropy is liger, which needs a CUDA device; use chunked here.")
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32)
