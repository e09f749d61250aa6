"""Nats of tokens from hidden states, without full logits.

The last layer's logits are the largest tensor of a language model (GPT-2-XL at 1024 tokens: 0.2 GiB a sequence in
fp32, and as much again for their gradient). They are computed a chunk of tokens at a time, and in training their
gradient is taken in the same pass, so that neither ever exists whole and the head's weight, which ZeRO-3 partitions,
is needed only once.
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
    """Return the cross-entropy of each label: the reference for everything below.

    Args:
        logits: Scores in any float dtype; position t predicts labels[..., t].
        labels: Shifted by one already. IGNORE_INDEX marks a token that is not scored.

    Returns:
        Nats, in float32, since bf16 is too coarse to sum a document; 0.0 at IGNORE_INDEX.

    Raises:
        IndexError: A label is outside the vocabulary.
    """
    flat = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view(labels.shape)


def chunks(num_tokens: int, vocab_size: int, device: torch.device) -> list[slice]:
    """Cut the tokens so that a chunk's fp32 logits stay within CHUNK_BYTES."""
    tokens = max(1, CHUNK_BYTES[device.type] // (4 * vocab_size))
    return [slice(begin, begin + tokens) for begin in range(0, num_tokens, tokens)]


class Vocabulary(NamedTuple):
    """Vocabulary entries whose logits this rank computes."""

    begin: int
    end: int
    is_cut: bool
    """Over tensor-parallel ranks. The layer's rows from `end - begin` on are then no words, only there to fill it."""

    def normalizer_and_target(
        self, logits: Float32[Tensor, "tokens words"], labels: Int64[Tensor, " tokens"]
    ) -> tuple[Float32[Tensor, "tokens 1"], Float32[Tensor, "tokens 1"]]:
        """Return the log of the softmax's sum over all words, and the label's logit; the same on all those ranks."""
        is_here, places = self.places(labels)
        mine = torch.stack([logits.logsumexp(-1), (logits.gather(-1, places) * is_here).squeeze(-1)])
        parts = parallel.gather_over_tensor_ranks(mine) if self.is_cut else mine.unsqueeze(0)
        normalizers, targets = parts.unbind(1)
        return normalizers.logsumexp(0).unsqueeze(-1), targets.sum(0).unsqueeze(-1)

    def nats(
        self, logits: Float[Tensor, "tokens words"], labels: Int64[Tensor, " tokens"]
    ) -> Float32[Tensor, " tokens"]:
        """Return the cross-entropy of each label among all words; the same on all those ranks."""
        normalizer, target = self.normalizer_and_target(logits.float(), labels)
        return (normalizer - target).squeeze(-1)

    def choices(self, logits: Float[Tensor, "tokens words"]) -> Int64[Tensor, " tokens"]:
        """Return the word of the largest logit, of equal ones the first; the same on all those ranks."""
        places = logits.argmax(-1, keepdim=True)
        largest, words = logits.gather(-1, places).squeeze(-1), places.squeeze(-1) + self.begin
        if not self.is_cut:
            return words
        first = parallel.gather_over_tensor_ranks(largest).argmax(0, keepdim=True)
        return parallel.gather_over_tensor_ranks(words).gather(0, first).squeeze(0)

    def places(self, labels: Int64[Tensor, " tokens"]) -> tuple[Bool[Tensor, "tokens 1"], Int64[Tensor, "tokens 1"]]:
        """Return a mask of the labels among this rank's vocabulary entries, and their columns; column 0 for others."""
        labels = labels.unsqueeze(-1)
        is_here = (labels >= self.begin) & (labels < self.end) if self.is_cut else labels >= 0
        return is_here, (labels - self.begin) * is_here


class LinearNats(torch.autograd.Function):
    """Summed nats of `labels` under softmax(hidden @ weight.T + bias); its gradients are ready after forward.

    Of a vocabulary cut over ranks each gives the rows it has; all get the same sum, and the same gradient of hidden.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Float[Tensor, "tokens width"],
        weight: Float[Tensor, "vocab width"],
        bias: Float[Tensor, " vocab"] | None,
        labels: Int64[Tensor, " tokens"],
        vocabulary: Vocabulary | None = None,
    ) -> Float32[Tensor, ""]:
        """Sum the nats; keep d nats / d input of each input that needs it."""
        words = vocabulary or Vocabulary(0, len(weight), is_cut=False)
        grads = _zero_gradients(ctx.needs_input_grad, hidden, weight, bias)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts = chunks(len(labels), len(weight), labels.device)  # of all rows: the same on all those ranks
        weight = weight[: words.end - words.begin]
        for part in parts:
            logits = F.linear(hidden[part], weight, bias).float()
            log_normalizer, target = words.normalizer_and_target(logits, labels[part])
            scored = (labels[part] != IGNORE_INDEX).unsqueeze(-1)
            total += ((log_normalizer - target) * scored).sum()
            if any(ctx.needs_input_grad):
                # d nats / d logits is softmax minus one-hot.
                slope = logits.sub_(log_normalizer).exp_()
                is_here, places = words.places(labels[part])
                slope.scatter_add_(-1, places, -is_here.to(slope.dtype)).mul_(scored)
                _accumulate(grads, slope, hidden[part], weight, part)
        if words.is_cut and grads[0] is not None:
            parallel.sum_over_tensor_ranks(grads[0])
        ctx.save_for_backward(*grads)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs: Float32[Tensor, ""]):
        """Scale the kept gradients."""
        return (
            *(None if grad is None else (grad * grad_outputs[0]).to(ctx.dtype) for grad in ctx.saved_tensors),
            None,
            None,
        )


def _zero_gradients(needed: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor | None]:
    """Gradients of weight and bias are sums over chunks, so they are kept in fp32."""
    return [
        torch.zeros_like(hidden) if needed[0] else None,
        torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None,
        torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needed[2] else None,
    ]


def _accumulate(grads: list[Tensor | None], slope: Tensor, hidden: Tensor, weight: Tensor, part: slice) -> None:
    grad_hidden, grad_weight, grad_bias = grads
    if grad_bias is not None:
        grad_bias += slope.sum(0)
    slope = slope.to(hidden.dtype)
    if grad_hidden is not None:
        torch.mm(slope, weight, out=grad_hidden[part])
    if grad_weight is not None:
        grad_weight[: slope.shape[1]] += slope.T @ hidden


class Head(nn.Module):
    """The output layer of a language model, from hidden states to nats.

    It owns the very parameters of the model's own output layer, so that DeepSpeed's ZeRO-3 hooks gather them here.
    """

    def __init__(self, output_layer: Any, cross_entropy: str = "chunked", vocabulary: Vocabulary | None = None):
        super().__init__()
        self.weight = output_layer.weight
        self.bias = getattr(output_layer, "bias", None)
        self.vocabulary = vocabulary
        self.liger = _liger() if cross_entropy == "liger" else None

    def forward(
        self, hidden: Float[Tensor, "batch time width"], labels: Int64[Tensor, "batch time"], per_token: bool = False
    ) -> Float32[Tensor, ...]:
        """Return the summed nats, or with `per_token` (no gradients) those of each label, 0.0 where not scored."""
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
        parts = [
            self._nats(flat[part], targets[part]) for part in chunks(len(targets), len(self.weight), labels.device)
        ]
        nats[scored] = torch.cat([nats.new_zeros(0), *parts])
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
            "--model.cross-entropy is liger, but liger-kernel is not there; install megaft[fast]."
        ) from error
    if not torch.cuda.is_available():
        raise ConfigError("--model.cross-entropy is liger, which needs a CUDA device; use chunked here.")
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="sum", accum_dtype=torch.float32)
