"""Validation during training: sliding-window scoring with the training engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Bool

from megaft.base.errors import DataError
from megaft.config.train import TrainConfig
from megaft.data.dataset import Dataset
from megaft.data.indexed import TokenFile
from megaft.data.sequence import Samples
from megaft.data.tokenizer import AnyTokenizer
from megaft.models.compiled import in_eager_mode
from megaft.scoring.score import Score, rows_of, score
from megaft.scoring.windows import Window, windows


class Validation:
    """A validation text and its windows, in which every token of every document is scored once.

    Documents begin as in training: with the special tokens that the tokenizer puts before every text, which are not
    scored, or with a chat template's own. Only text with neither gets a prefix token, so that something predicts its
    first token. For prompts with completions, and for chats, the score covers what training scores; for other texts,
    everything but the end-of-document tokens that their preparation appended.
    """

    def __init__(
        self, dataset: Dataset, config: TrainConfig, tokenizer: AnyTokenizer, rope_length_limit: int | None = None
    ):
        prefix, receipt = dataset.prefix, dataset.receipt
        self.tokens = TokenFile(prefix, receipt["tokenizer"]["vocab_size"])
        # Scored tokens of completions and answers may include characters of the prompt or template, so counts of words
        # and bytes would not match.
        has_mask = receipt["has_mask"]
        num_opening = len(receipt.get("opening_ids", ()))
        self.prefix_id = None if has_mask or num_opening else tokenizer.prefix_id
        self.is_scored = _scored_tokens(prefix, self.tokens) if has_mask else None
        self.rows = rows_of(
            self.tokens,
            lambda num_tokens: scored_from(
                num_opening, windows(num_tokens, config.eval_context_length, config.eval_stride)
            ),
            prefix_id=self.prefix_id,
            eod_id=None if has_mask else receipt["eod_id"],
        )
        if not self.rows:
            raise DataError(f"{prefix} has no token to validate on; give --data.valid a longer text.")
        self.options = {
            "rope_length_limit": rope_length_limit,
            "tokens_per_batch": config.eval.batch_size * config.eval_context_length,
            "num_words": None if has_mask else receipt["words"],
            "num_bytes": None if has_mask or not receipt["tokenizer"]["round_trip"] else receipt["bytes"],
        }
        self.source = prefix
        self.name = f"{receipt['bin_sha256']}, windows of {config.eval_context_length}, stride {config.eval_stride}"
        """Identity of data and windows; scores with the same name are comparable."""

    def __call__(self, engine, device: torch.device) -> Score:
        """Return the score of the text under the engine's current weights; every rank calls this and gets the same.

        Raises:
            NumericsError: Nats of a scored token are not finite.
        """
        engine.eval()
        try:
            with in_eager_mode():
                whole = score(
                    self.tokens,
                    self.rows,
                    lambda batch: engine(batch.input_ids, batch.labels, positions=batch.positions).unsqueeze(0),
                    device=device,
                    prefix_id=self.prefix_id,
                    is_included=self.is_scored,
                    name=f"--data.valid {self.source}",
                    **self.options,
                )
        finally:
            engine.train()
        return whole if self.is_scored is None else whole.of(self.is_scored)


def scored_from(position: int, windows: Iterable[Window]) -> Iterator[Window]:
    """Yield a document's windows, scored from a position on; windows that end before it are dropped."""
    for window in windows:
        if window.end > position:
            yield window._replace(scored_from=max(window.scored_from, position))


def _scored_tokens(prefix: str, tokens: TokenFile) -> Bool[np.ndarray, " tokens"]:
    """Return the mask of tokens that training scores, without each document's first token, which has no context."""
    is_scored = TokenFile(f"{prefix}.scored").read(0, tokens.num_tokens) != 0
    is_scored[tokens.document_offsets[:-1]] = False
    if not is_scored.any():
        raise DataError(f"{prefix} has no scored token to validate on; give --data.valid a text with completions.")
    return is_scored


NUM_TOKENS = 512
"""Maximum held-out tokens on which the exported and trained models are compared."""


def held_out_rows(validation: Validation | None, samples: Samples, longest: int) -> list[list[int]]:
    """Return the first tokens of the validation text, or without one of the first training samples, as input rows.

    Args:
        validation: The run's validation.
        samples: The run's training samples.
        longest: Input tokens per forward pass.
    """
    if validation is not None:
        opening = [] if validation.prefix_id is None else [validation.prefix_id]
        ids = opening + validation.tokens.read(0, min(NUM_TOKENS, validation.tokens.num_tokens)).tolist()
        if len(ids) > 1:
            return [ids[begin : begin + longest + 1] for begin in range(0, len(ids) - 1, longest)]
    rows: list[list[int]] = []
    for position in range(NUM_TOKENS):
        if sum(map(len, rows)) >= NUM_TOKENS:
            break
        rows.append(samples[position].input_ids[: min(longest, NUM_TOKENS) + 1].tolist())
    return [row for row in rows if len(row) > 1]
