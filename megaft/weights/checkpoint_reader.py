"""Read parameters from the files of a checkpoint, whichever ranks wrote them."""

from __future__ import annotations

from collections import defaultdict
from operator import itemgetter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaft.base.errors import CheckpointError
from megaft.weights.manifest import RECOPY


class CheckpointReader:
    """Reader of a checkpoint's tensor slices that presents every parameter as one flat tensor."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder = folder
        self.shapes = {name: torch.Size(shape) for name, shape in manifest["shapes"].items()}
        self._spans = defaultdict(list)
        for name in manifest["files"]:
            self._index(folder / name)
        for spans in self._spans.values():
            spans.sort(key=itemgetter(0))

    def _index(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                whole, _, offset = key.rpartition("@")
                kind, _, name = whole.partition("/")
                self._spans[name, kind].append((int(offset), file, key))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is not a safetensors file written by megaft ({error}); {RECOPY}.") from error

    def read(self, name: str, kind: str, offset: int, numel: int) -> Tensor:
        """Return `numel` elements from `offset` of a flattened parameter's weight or moment.

        Raises:
            CheckpointError: The checkpoint does not have the parameter, or not all of its elements.
        """
        out, num_read = torch.empty(numel), 0
        for begin, file, key in self._spans[name, kind]:
            stored = file.get_slice(key)
            first, last = max(begin, offset + num_read), min(begin + stored.get_shape()[0], offset + numel)
            if first == offset + num_read and first < last:
                out[num_read : num_read + last - first] = stored[first - begin : last - begin]
                num_read += last - first
        if num_read != numel:
            raise CheckpointError(f"{self.folder} has {num_read} of {numel} elements of {kind} of {name}; {RECOPY}.")
        return out

    def whole(self, name: str, kind: str) -> Tensor:
        """Return the weight or a moment of a parameter, or of its tensor-parallel shard, in its shape."""
        shape = self.shapes[name.partition("|")[0]]
        return self.read(name, kind, 0, shape.numel()).view(shape)


WEIGHT = "weight"
"""Kind of the fp32 weight itself; the other kinds are the optimizer's names of its moments."""


def shard_name(name: str, tensor_parallel_rank: int) -> str:
    """Return the name of a tensor-parallel shard in checkpoints."""
    return f"{name}|{tensor_parallel_rank}"
