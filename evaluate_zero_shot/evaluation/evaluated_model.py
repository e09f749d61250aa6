"""Model under evaluation, with its tokenizer and the hash of its files."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evaluate_zero_shot.config import EvaluateConfig
from megaft.base import parallel
from megaft.base.errors import DataError
from megaft.data.tokenizer import AnyTokenizer
from megaft.models.backend import Backend
from megaft.scoring.model import Scorer, load_scoring_model
from megaft.weights.folder import model_source
from megaft.weights.provenance import sha256_of_model


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """Model under evaluation."""

    source: str
    """As the user named it."""
    sha256: str
    backend: Backend
    scorer: Scorer
    dtype: torch.dtype
    device: torch.device
    tokenizer: AnyTokenizer


def load(
    source: str, tokenizer: AnyTokenizer, config: EvaluateConfig, backend: Backend, device: torch.device
) -> EvaluatedModel:
    """Load a model, or this rank's shard of it, onto the device.

    Raises:
        DataError: It does not exist, or does not fit its tokenizer.
    """
    path, dtype = model_source(source), getattr(torch, config.dtype)
    scorer = load_scoring_model(path, dtype=dtype, device=device, backend=backend, is_partitioned=config.partition)
    if tokenizer.vocab_size > scorer.vocab_size:
        raise DataError(
            f"--model is {source}, whose tokenizer has {tokenizer.vocab_size} tokens, but it embeds "
            f"{scorer.vocab_size}; use the tokenizer that the model was trained with."
        )
    return EvaluatedModel(
        source=source,
        sha256=_sha256(path),
        backend=backend,
        scorer=scorer,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
    )


def _sha256(path: str) -> str:
    """Return the hash of a model's files on every rank; the main rank alone reads them."""
    digest = bytes.fromhex(sha256_of_model(path)) if parallel.is_main() else bytes(32)
    return bytes(parallel.broadcast_from_main(torch.tensor(list(digest))).tolist()).hex()
