"""Portable name and SHA-256 of a model, for model cards and results."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megaft.base.files import sha256_of
from megaft.base.redaction import without_folders, without_secrets
from megaft.weights.reading import folder_of

SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja")
"""Suffixes of weight files and of the configuration files beside them."""


def published_name(source: str) -> str:
    """Return a hub name unchanged; for a local path, its last component and the start of the model's SHA-256.

    Without the hash, the folder's name could be confused with a model on the hub.
    """
    if not Path(source).exists():
        return without_folders(without_secrets(source))
    return f"{Path(source).absolute().name} (SHA-256 {sha256_of_model(source)[:16]})"


def sha256_of_model(source: str) -> str:
    """Return the SHA-256 over the names and contents of the model's files.

    Args:
        source: A model folder, a GGUF file, or the hub name of a cached model.
    """
    digest = hashlib.sha256()
    for file in _files(source):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _files(source: str) -> list[Path]:
    if Path(source).is_file():
        return [Path(source)]
    return sorted(file for file in folder_of(source).iterdir() if file.suffix in SUFFIXES)
