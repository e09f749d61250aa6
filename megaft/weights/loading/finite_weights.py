"""Refusal of NaN and infinite weights, by file, tensor and count, before anything is computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megaft.base.dtypes import dtype_name
from megaft.base.errors import DataError

FIX = "the model is damaged. Copy it anew, or go back to a checkpoint before it."


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite, without a copy of the tensor: aminmax passes a NaN on."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bound.isfinite() for bound in tensor.aminmax())


def require_finite(name: str, tensor: Tensor, where: str = "") -> Tensor:
    """Return a weight, all of whose values are finite.

    Args:
        name: Of the weight.
        tensor: The weight.
        where: How the message begins, such as "--model.path is DIR; ".

    Raises:
        DataError: It holds NaN or infinite values.
    """
    if is_finite(tensor):
        return tensor
    raise DataError(f"{where}{_fault(name, tensor)}; {FIX}")


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters and the buffers that its files hold, with their names.

    DeepSeek-V3's bias of its router is such a buffer: with a NaN there the model takes other experts, and all that it
    returns is finite.
    """
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def require_finite_weights(model: str, source: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse loaded weights that are not finite; one pass over memory.

    The message names the stored tensor and its file, where the model is a folder of safetensors: these are read again
    then, a tensor at a time.

    Args:
        model: How the message names the model, such as "--model.path is DIR".
        source: The model.
        weights: Loaded weights and their names.

    Raises:
        DataError: One holds NaN or infinite values.
    """
    for name, tensor in weights:
        if not is_finite(tensor):
            _refuse_stored(model, source)
            if tensor.dtype == torch.float32:
                require_finite(name, tensor, f"{model}; ")
            raise DataError(
                f"{model}; in {dtype_name(tensor.dtype)} {_fault(name, tensor)}; use float32, or copy the model anew."
            )


def _refuse_stored(model: str, source: str) -> None:
    """Raise DataError for the stored tensors of a folder that are not finite, if there are any."""
    faults = [
        f"in {path.name} {_fault(name, tensor)}" for path, name, tensor in _stored(source) if not is_finite(tensor)
    ]
    if faults:
        more = f" ({len(faults)} tensors have such values)" if len(faults) > 1 else ""
        raise DataError(f"{model}; {faults[0]}{more}; {FIX}")


def _stored(source: str) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield every tensor of a folder's safetensors files, one at a time."""
    for path in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield path, name, file.get_tensor(name)


def _fault(name: str, tensor: Tensor) -> str:
    is_bad = ~tensor.isfinite()
    first = [int(place) for place in torch.unravel_index(is_bad.flatten().view(torch.uint8).argmax(), tensor.shape)]
    return f"{name} has {int(is_bad.sum()):,} of {tensor.numel():,} values that are not finite, the first at {first}"
