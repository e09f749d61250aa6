"""Present any checkpoint in transformers' parameter names and layout, sliced for this engine's ranks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from megaft.base import parallel
from megaft.weights.checkpoint_reader import CheckpointReader, shard_name
from megaft.weights.layout import Layout, layout_of
from megaft.weights.manifest import verify

HUGGING_FACE, MEGATRON = "language_model.", "language_model.gpt."
"""Prefixes of parameter names in checkpoints of each backend."""


class TransformersView:
    """A checkpoint's weights and optimizer moments under transformers' parameter names."""

    def __init__(self, reader: CheckpointReader, manifest: dict[str, Any], architecture: Any) -> None:
        """Wrap the reader of a checkpoint with this manifest and model configuration (transformers')."""
        self._reader, self._size = reader, manifest["tensor_parallel_size"]
        is_megatron = manifest["backend"] == "megatron"
        self._layout: Layout | None = layout_of(architecture) if is_megatron else None
        self._unsharded = lru_cache(maxsize=1)(self._unshard)  # queries, keys and values are read one after the other

    def read(self, name: str, kind: str) -> Tensor:
        """Return an unsharded weight or moment.

        Raises:
            CheckpointError: The checkpoint does not have all of its elements.
        """
        if self._layout is None:
            return self._reader.whole(HUGGING_FACE + name, kind)
        return self._unsharded(self._layout.core_name_of(name), kind)[name]

    def _unshard(self, core_name: str, kind: str) -> dict[str, Tensor]:
        assert self._layout is not None
        is_sharded = self._size > 1 and self._layout.rules[core_name].axis is not None
        name = MEGATRON + core_name
        stored = [shard_name(name, rank) for rank in range(self._size)] if is_sharded else [name]
        return self._layout.whole(core_name, [self._reader.whole(shard, kind) for shard in stored])


class ReshardedReader:
    """Reader like `CheckpointReader`, for a backend or tensor-parallel size other than the checkpoint's."""

    def __init__(self, view: TransformersView, layout: Layout | None) -> None:
        """Read for megatron-core's modules, or for transformers' if there is no layout."""
        self._view, self._layout = view, layout

    def read(self, name: str, kind: str, offset: int, numel: int) -> Tensor:
        """Return `numel` elements from `offset` of this rank's flattened parameter or shard.

        Raises:
            CheckpointError: The checkpoint does not have all of its elements.
        """
        if self._layout is None:
            return self._view.read(name.removeprefix(HUGGING_FACE), kind).flatten()[offset : offset + numel]
        core_name = name.removeprefix(MEGATRON).partition("|")[0]
        sources = [self._view.read(source, kind) for source in self._layout.rules[core_name].sources]
        shard = self._layout.local(core_name, sources, parallel.tensor_parallel_size(), parallel.tensor_parallel_rank())
        return shard.flatten()[offset : offset + numel]


def transformers_view(folder: Path, architecture: Any) -> TransformersView:
    """Verify a checkpoint and return its weights and moments under transformers' parameter names.

    Args:
        folder: The checkpoint's folder.
        architecture: transformers' configuration of the model.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    manifest = verify(folder)
    return TransformersView(CheckpointReader(folder, manifest), manifest, architecture)
