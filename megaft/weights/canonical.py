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
"""Prefix of a parameter's name in a checkpoint of each backend."""


class TransformersView:
    """The weights and moments of a checkpoint by transformers' names."""

    def __init__(self, reader: CheckpointReader, manifest: dict[str, Any], architecture: Any) -> None:
        """Read `reader`, which modules of `manifest`'s backend wrote, of a model of this transformers configuration."""
        self._reader, self._size = reader, manifest["tensor_parallel_size"]
        is_megatron = manifest["backend"] == "megatron"
        self._layout: Layout | None = layout_of(architecture) if is_megatron else None
        self._whole = lru_cache(maxsize=1)(self._put_together)  # queries, keys and values are asked for in turn

    def read(self, name: str, kind: str) -> Tensor:
        """Return a whole weight or moment.

        Raises:
            CheckpointError: The checkpoint does not have all of it.
        """
        if self._layout is None:
            return self._reader.whole(HUGGING_FACE + name, kind)
        return self._whole(self._layout.rule_of(name), kind)[name]

    def _put_together(self, there: str, kind: str) -> dict[str, Tensor]:
        assert self._layout is not None
        is_cut = self._size > 1 and self._layout.rules[there].axis is not None
        stored = [shard_name(MEGATRON + there, rank) for rank in range(self._size)] if is_cut else [MEGATRON + there]
        return self._layout.whole(there, [self._reader.whole(one, kind) for one in stored])


class ReshardedReader:
    """Reader as `CheckpointReader`, for another backend or tensor-parallel size than the checkpoint's."""

    def __init__(self, view: TransformersView, layout: Layout | None) -> None:
        """Read for modules of megatron-core, which have a layout, or for transformers'."""
        self._view, self._layout = view, layout

    def read(self, name: str, kind: str, offset: int, numel: int) -> Tensor:
        """Return `numel` elements from `offset` of the flattened parameter that this rank has.

        Raises:
            CheckpointError: The checkpoint does not have all of it.
        """
        if self._layout is None:
            return self._view.read(name.removeprefix(HUGGING_FACE), kind).flatten()[offset : offset + numel]
        there = name.removeprefix(MEGATRON).partition("|")[0]
        sources = [self._view.read(source, kind) for source in self._layout.rules[there].sources]
        mine = self._layout.local(there, sources, parallel.tensor_parallel_size(), parallel.tensor_parallel_rank())
        return mine.flatten()[offset : offset + numel]


def transformers_view(folder: Path, architecture: Any) -> TransformersView:
    """Return a checkpoint's weights and moments by transformers' names.

    Args:
        folder: The checkpoint's.
        architecture: transformers' configuration of the model.

    Raises:
        CheckpointError: It does not hold.
    """
    manifest = verify(folder)
    return TransformersView(CheckpointReader(folder, manifest), manifest, architecture)
