"""Refuse NaN and infinite weights before use, naming file, tensor and count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from megaft.base.dtypes import dtype_name
from megaft.base.errors import DataError

FIX = "the model is damaged. Copy it again, or use an earlier checkpoint."


def is_finite(tensor: Tensor) -> bool:
    """Return True if every value is finite, without copying the tensor: aminmax propagates NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(bound.isfinite() for bound in tensor.aminmax())


def require_finite(name: str, tensor: Tensor, where: str = "") -> Tensor:
    """Return a weight after checking that all values are finite.

    Args:
        name: Name of the weight.
        tensor: The weight.
        where: Start of the message, such as "--model.path is DIR; ".

    Raises:
        DataError: A value is NaN or infinite.
    """
    if is_finite(tensor):
        return tensor
    raise DataError(f"{where}{_fault(name, tensor)}; {FIX}")


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of a model's parameters and persistent buffers.

    One such buffer is the bias of DeepSeek-V3's router: with a NaN in it the model selects other experts, and its
    output stays finite.
    """
    yield from model.named_parameters()
    saved = model.state_dict(keep_vars=True)
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def require_finite_weights(model: str, source: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse loaded weights that are not finite, in one pass over memory.

    If the model is a folder of safetensors files, they are read again to name the stored tensor and its file.

    Args:
        model: Setting and value for the message, such as "--model.path is DIR".
        source: The model.
        weights: Names and loaded weights.

    Raises:
        DataError: A value is NaN or infinite.
    """
    for name, tensor in weights:
        if not is_finite(tensor):
            _refuse_stored(model, source)
            if tensor.dtype == torch.float32:
                require_finite(name, tensor, f"{model}; ")
            raise DataError(
                f"{model}; in {dtype_name(tensor.dtype)} {_fault(name, tensor)}; use float32, or copy the model again."
            )


def _refuse_stored(model: str, source: str) -> None:
    """Raise DataError if stored tensors of a folder are not finite."""
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
    first = [int(index) for index in torch.unravel_index(is_bad.flatten().view(torch.uint8).argmax(), tensor.shape)]
    return f"{name} has {int(is_bad.sum()):,} of {tensor.numel():,} values that are not finite, the first at {first}"
