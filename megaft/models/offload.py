"""Models larger than host memory: accelerate loads weights just before a module's forward pass and frees them after."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from megaft.weights.loading import pretrained

FILE_SIZE = "2GB"
"""Largest shard file of a saved offloaded model."""

Fetch = Callable[[str], Tensor]
"""Returns a parameter by transformers' name; tied parameters are requested by the first of their names."""


def num_offloadable(config: Any) -> int | None:
    """Return the number of parameters of a configuration's model, or None if it cannot be offloaded.

    A model whose state has buffers or frozen parameters cannot be: checkpoints do not contain those.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    has_more = model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    has_frozen = not all(parameter.requires_grad for parameter in model.parameters())
    return None if has_more or has_frozen else model.num_parameters()


def offloaded_model(config: Any, fetch: Fetch, dtype: torch.dtype = torch.float32) -> Any:
    """Return a transformers model that fetches its parameters one block at a time.

    Args:
        config: transformers' configuration.
        fetch: Returns a parameter in `dtype`.
        dtype: Dtype of the model.
    """
    from accelerate import cpu_offload, init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = pretrained.new_model(config)
    model.tie_weights()
    weights: Any = _FetchedWeights(fetch, _first_names(model))
    blocks: list[str] = [*(model._no_split_modules or ())]
    return cpu_offload(model.to(dtype), torch.device("cpu"), state_dict=weights, preload_module_classes=blocks)


def save_offloaded(model: Any, folder: Path) -> None:
    """Write an offloaded model with `save_pretrained`, which holds one file's weights at a time."""
    model.hf_device_map = {"": "disk"}  # tells save_pretrained that the model is offloaded
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=FILE_SIZE)


@contextmanager
def from_disk(folder: Path) -> Iterator[Any]:
    """Load a model folder with transformers' from_pretrained, leaving matrices on disk until their layer computes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with TemporaryDirectory(dir=folder.parent, prefix="offload.") as converted:
        yield AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map=dict(_devices(empty)), offload_folder=converted
        )


class _FetchedWeights(Mapping[str, Tensor]):
    def __init__(self, fetch: Fetch, first_names: dict[str, str]) -> None:
        self._fetch, self._first_names = fetch, first_names

    def __getitem__(self, name: str) -> Tensor:
        return self._fetch(self._first_names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._first_names)

    def __len__(self) -> int:
        return len(self._first_names)


def _first_names(model: nn.Module) -> dict[str, str]:
    """Map each name of a parameter to the first of that parameter's names."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first.setdefault(id(parameter), name) for name, parameter in named}


def _devices(module: nn.Module, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and device of each innermost module: "disk" if it has a matrix, else "cpu"."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    children = dict(module.named_children())
    if name and (tensors or not children):
        is_large = any(parameter.ndim > 1 for parameter in module.parameters())
        yield name, "disk" if is_large else "cpu"
    else:
        for child_name, child in children.items():
            yield from _devices(child, f"{name}.{child_name}" if name else child_name)
