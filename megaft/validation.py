"""Validation in the training loop: the evaluator of `scoring`, on the engine that trains."""

from __future__ import annotations

import torch

from megaft.config import TrainConfig
from megaft.indexed import TokenFile
from megaft.receipt import load_receipt
from megaft.scoring import Score, score
from megaft.tokenizer import AnyTokenizer
from megaft.training_data import Source


class Validation:
    """A validation text and how it is scored: a prefix token, then every token of every document once."""

    def __init__(self, source: Source, config: TrainConfig, tokenizer: AnyTokenizer):
        receipt = load_receipt(source.prefix)
        self.tokens = TokenFile(source.prefix)
        # Of a text with unscored prompts, words and bytes of the scored part alone are not known.
        is_all_scored = receipt["scored_tokens"] == receipt["tokens"]
        self.options = {
            "context_length": config.eval_context_length,
            "stride": config.eval_stride,
            "batch_size": config.eval.batch_size,
            "prefix_id": tokenizer.prefix_id,
            "eod_id": receipt["eod_id"],
            "num_words": receipt["words"] if is_all_scored else None,
            "num_bytes": receipt["bytes"] if is_all_scored else None,
        }

    def __call__(self, engine, device: torch.device) -> Score:
        """Score the text with the engine's weights of now; every rank calls this and gets the same score."""
        engine.eval()
        try:
            return score(
                self.tokens,
                lambda input_ids, labels: engine(input_ids, labels, per_token=True),
                device=device,
                **self.options,
            )
        finally:
            engine.train()
