"""Read parameters from the pieces of a checkpoint that all ranks wrote."""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaft.base.errors import CheckpointError


class CheckpointReader:
    """The pieces of a checkpoint, read as if every parameter were one flat tensor."""

    def __init__(self, folder: Path, manifest: dict):
        self.shapes = {name: torch.Size(shape) for name, shape in manifest["shapes"].items()}
        self._spans = defaultdict(list)
        for name in manifest["files"]:
            self._index(folder / name)
        for spans in self._spans.values():
            spans.sort(key=itemgetter(0))

    def _index(self, path: Path) -> None:
        try:
            shard = safe_open(path, framework="pt")
            for key in shard.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                whole, _, offset = key.rpartition("@")
                kind, _, name = whole.partition("/")
                self._spans[name, kind].append((int(offset), shard, key))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file of ours: {error}") from error

    def read(self, name: str, kind: str, offset: int, numel: int) -> Tensor:
        """Return `numel` elements from `offset` of a flattened parameter's weight or moment.

        Raises:
            CheckpointError: The checkpoint has no such parameter, or not all of it.
        """
        out, found = torch.empty(numel), 0
        for begin, shard, key in self._spans[name, kind]:
            piece = shard.get_slice(key)
            first, last = max(begin, offset + found), min(begin + piece.get_shape()[0], offset + numel)
            if first == offset + found and first < last:
                out[found : found + last - first] = piece[first - begin : last - begin]
                found += last - first
        if found != numel:
            raise CheckpointError(f"the checkpoint holds {found} of {numel} elements of {kind} of {name}.")
        return out

    def whole(self, name: str, kind: str) -> Tensor:
        """Return the weight or a moment of a parameter, or a tensor-parallel rank's part of it, in its shape."""
        shape = self.shapes[name.partition("|")[0]]
        return self.read(name, kind, 0, shape.numel()).view(shape)


WEIGHT = "weight"
"""The kind of the fp32 weight itself; the other kinds are the optimizer's names of its moments."""


def shard_name(name: str, tensor_parallel_rank: int) -> str:
    """Return the name in checkpoints of a rank's shard of a parameter."""
    return f"{name}|{tensor_parallel_rank}"
