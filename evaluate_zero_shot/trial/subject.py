"""Load the model under evaluation, and identify it by the hash of its files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import cached_file

from evaluate_zero_shot.config import EvaluateConfig
from megaft.base import parallel
from megaft.base.errors import DataError
from megaft.base.files import sha256_of
from megaft.data.tokenizer import AnyTokenizer, load_tokenizer
from megaft.models.backend import Backend
from megaft.scoring.model import Scorer, load_scoring_model
from megaft.weights.reading import model_source

WEIGHTS = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja")
"""Suffixes of weight files and of the configuration files beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """The model under evaluation."""

    source: str
    """As the user named it."""
    sha256: str
    backend: Backend
    scorer: Scorer
    dtype: torch.dtype
    device: torch.device
    tokenizer: AnyTokenizer


def load(source: str, config: EvaluateConfig, backend: Backend, device: torch.device) -> Subject:
    """Load a model on this rank, or its share of it.

    Raises:
        DataError: It is not there, or does not fit its tokenizer.
    """
    path, dtype = model_source(source), getattr(torch, config.dtype)
    tokenizer = parallel.together(load_tokenizer, path)
    scorer = load_scoring_model(path, dtype=dtype, device=device, backend=backend, is_partitioned=config.partition)
    if tokenizer.vocab_size > scorer.vocab_size:
        raise DataError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {scorer.vocab_size}; "
            "use the tokenizer the model was made with."
        )
    return Subject(
        source=source,
        sha256=_sha256(path),
        backend=backend,
        scorer=scorer,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
    )


def _sha256(path: str) -> str:
    """Return the same on every rank; the main rank alone reads the files."""
    digest = hashlib.sha256()
    if parallel.is_main():
        for file in _files(path):
            digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return bytes(parallel.from_main(torch.tensor(list(digest.digest()))).tolist()).hex()


def _files(path: str) -> list[Path]:
    if Path(path).is_file():
        return [Path(path)]
    # What was loaded by a hub name lies in the hub's cache.
    folder = Path(path) if Path(path).is_dir() else Path(str(cached_file(path, "config.json"))).parent
    return sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS)
