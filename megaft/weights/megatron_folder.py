"""Folders of `megaft convert --format megatron`: one safetensors file per tensor-parallel rank, and a manifest."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaft.base.errors import DataError
from megaft.base.files import is_file_name, parse_json, sha256_of
from megaft.base.plural import counted
from megaft.weights.layout import Layout, layout_of
from megaft.weights.loading.weight_files import require_no_more
from megaft.weights.parameters import require_fitting, shapes_of
from megaft.weights.tensor_file import TensorFile, open_tensors

MANIFEST = "megatron.json"
FORMAT = 1
"""Format version of the manifest."""


def is_megatron_folder(folder: Path) -> bool:
    """Return True if a folder was written by `megaft convert --format megatron`."""
    return (folder / MANIFEST).is_file()


def shards_of(folder: Path, config: Any, *, verify_hashes: bool = False) -> list[TensorFile]:
    """Return the file of each tensor-parallel rank, after checking sizes and shapes.

    Raises:
        DataError: A file is missing or differs; the message names it.
    """
    manifest = read_manifest(folder)
    layout, shapes, size = layout_of(config), shapes_of(config), manifest["tensor_parallel_size"]
    files = [_checked(folder, name, entry, verify_hashes) for name, entry in sorted(manifest["files"].items())]
    if len(files) != size:
        raise DataError(
            f"{folder / MANIFEST} names {counted(len(files), 'file')} for {counted(size, 'rank')}; "
            "convert the model again."
        )
    for rank, file in enumerate(files):
        stored = {name: span.shape for name, span in file.spans.items()}
        require_fitting(str(file.path), local_shapes(layout, shapes, size, rank), stored)
        require_no_more(f"model is {file.path}", layout.rules, stored)
    return files


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a megatron folder.

    Raises:
        DataError: The manifest is damaged or of an unsupported format.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        version, files, _ = manifest["format"], manifest["files"], int(manifest["tensor_parallel_size"])
        for entry in files.values():
            _ = entry["bytes"], entry["sha256"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); convert the model again.") from error
    if version != FORMAT:
        raise DataError(
            f"{path} has format {version}; convert the model again: this version of megaft reads format {FORMAT}."
        )
    return manifest


def _checked(folder: Path, name: str, entry: dict[str, Any], verify_hashes: bool) -> TensorFile:
    path = folder / name
    if not is_file_name(name):
        raise DataError(
            f"{folder / MANIFEST} names {name[:80]}, which is not a file in its folder; copy the folder again."
        )
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        size = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
        raise DataError(f"{path} {size}; {MANIFEST} says {entry['bytes']} bytes. Copy it again.")
    if verify_hashes and sha256_of(path) != entry["sha256"]:
        raise DataError(f"{path} is damaged: its SHA-256 differs from the one in {MANIFEST}. Copy it again.")
    return open_tensors(path)


def local_shapes(layout: Layout, shapes: dict[str, torch.Size], size: int, rank: int) -> dict[str, torch.Size]:
    """Return the shapes of one tensor-parallel rank's shards, by megatron-core name."""

    @cache
    def meta(source: str) -> Tensor:
        return torch.empty(shapes[source], device="meta")

    return {
        name: layout.local(name, [meta(source) for source in rule.sources], size, rank).shape
        for name, rule in layout.rules.items()
    }
