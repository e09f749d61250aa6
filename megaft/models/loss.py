"""Cross-entropy in nats from hidden states, in chunks, without materializing the full logits.

The last layer's logits are the largest tensor of a language model (GPT-2-XL at 1024 tokens: 0.2 GiB per sequence
in fp32, and as much again for their gradient). They are computed one chunk of tokens at a time, and in training their
gradient is computed in the same pass, so neither is ever materialized, and the head's weight, which ZeRO-3 partitions,
is gathered only once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from megaft.base import parallel
from megaft.base.hardware import chunk_rows
from megaft.data.samples import IGNORE_INDEX


def at_positions(values: Tensor, positions: Int64[Tensor, " selected"]) -> Tensor:
    """Return the values at positions of the flattened batch: shape (batch, time, ...) to (selected, ...)."""
    return values.flatten(0, 1).index_select(0, positions)


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
    """Split the tokens into chunks of an equal number of rows, which depends on the vocabulary and device only."""
    tokens = chunk_rows(vocab_size, device.type)
    return [slice(begin, begin + tokens) for begin in range(0, num_tokens, tokens)]


class VocabularyShard(NamedTuple):
    """Vocabulary entries [begin, end) whose logits this rank computes."""

    begin: int
    end: int
    is_sharded: bool
    """True if sharded over tensor-parallel ranks; the layer's rows from `num_local` on are then padding."""

    @property
    def num_local(self) -> int:
        """Entries of this rank."""
        return self.end - self.begin

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
