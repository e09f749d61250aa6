"""A model's weights under transformers' names, read one tensor at a time, and their shapes from config.json.

Memory is bounded by the largest parameter, except for `.bin` and GGUF files, which transformers loads whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from megaft.base.errors import DataError
from megaft.weights.layout import layout_of
from megaft.weights.loading.config_errors import padding_rule
from megaft.weights.loading.text_model import require_causal_class

CONFIG_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(AssertionError, ImportError, StrictDataclassError),
)
"""Exceptions of transformers and torch for an invalid config.json."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a model under transformers' names, read on demand."""

    config: Any
    """transformers' configuration."""
    dtype: torch.dtype
    """Dtype that holds every stored value exactly."""
    shapes: dict[str, torch.Size]
    """Shapes of all parameters, without tied duplicates."""
    fetch: Callable[[str], Tensor]

    @property
    def num_parameters(self) -> int:
        """Total elements of all weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Transformers' names of all parameters, in its order."""
        return tuple(self.shapes)

    def shape(self, name: str) -> torch.Size:
        """Return a parameter's shape."""
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """Return a parameter in its stored dtype, in memory of its own.

        Raises:
            DataError: The file cannot be read.
        """
        return self.fetch(name)


def load_config(source: str) -> Any:
    """Return transformers' configuration of a model.

    Raises:
        DataError: The configuration is missing, or transformers cannot read it.
    """
    from transformers import AutoConfig

    with naming_config_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        require_causal_class(config)
    return config


@contextmanager
def naming_config_errors(source: str, config: Any = None) -> Iterator[None]:
    """Convert errors of transformers and torch for an invalid configuration to a DataError.

    Args:
        source: The model it is from.
        config: The configuration, if transformers could read it.
    """
    try:
        yield
    except CONFIG_ERRORS as error:
        reason = padding_rule(error, config) or " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(
            f"model is {source}; transformers cannot build a model from its config.json: {reason}"
        ) from error


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """Return the parameter shapes of a transformers model without allocating it; tied parameters appear once.

    Raises:
        DataError: The configuration is invalid.
    """
    from transformers import AutoModelForCausalLM

    with naming_config_errors(config.name_or_path, config), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def widest_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the smallest dtype that holds every value of these dtypes exactly."""
    return reduce(torch.promote_types, dtypes)


def from_shards(config: Any, dtype: torch.dtype, read: Callable[[str], list[Tensor]]) -> Weights:
    """Return weights from `read`, which maps a megatron-core name to the shards of all tensor-parallel ranks."""
    layout = layout_of(config)

    @lru_cache(maxsize=1)  # fused queries, keys and values are read one after the other
    def whole(name: str) -> dict[str, Tensor]:
        return layout.whole(name, read(name))

    return Weights(config, dtype, shapes_of(config), lambda name: whole(layout.core_name_of(name))[name])


def require_fitting(source: str, expected: dict[str, torch.Size], stored: dict[str, torch.Size]) -> None:
    """Raise DataError with the first tensor that is missing or whose shape differs from config.json's."""
    wrong = {
        name: f"is {list(stored[name])}, not {list(shape)}" if name in stored else "is missing"
        for name, shape in expected.items()
        if stored.get(name) != shape
    }
    if wrong:
        name = next(iter(wrong))
        raise DataError(
            f"model is {source}; its weights do not fit its config.json: {name} {wrong[name]} "
            f"({len(wrong)} in all). Copy both from one model."
        )
