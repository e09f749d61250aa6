"""Keep loaded weights as stored and frozen parameters frozen, where a family of transformers does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from megaft.weights.loading.replaced import replaced
from megaft.weights.loading.stand_in import keeping_random_states

ZEROES_PADDING = ("youtu",)
"""Families whose embedding gets a zero row for the padding token whenever transformers loads it."""


@contextmanager
def keeping_stored_weights() -> Iterator[None]:
    """Initialize only modules that hold something which was not loaded, such as a buffer that no file stores.

    transformers leaves it to each family to spare what was loaded. Youtu sets the padding row of its embedding to zero
    all the same, and some families look at the shapes of weights, which ZeRO-3 has already partitioned.
    """
    plain = PreTrainedModel._initialize_weights

    def initialize(self: Any, module: nn.Module, is_custom_code: bool = False) -> None:
        if not _is_loaded(module):
            plain(self, module, is_custom_code)

    with replaced(PreTrainedModel, "_initialize_weights", initialize):
        yield


def _is_loaded(module: nn.Module) -> bool:
    """Return whether transformers has marked every tensor of a module and of its children as loaded."""
    return all(getattr(tensor, "_is_hf_initialized", False) for tensor in chain(module.parameters(), module.buffers()))


def keep_padding_row(model: Any) -> None:
    """Leave the padding token to generation_config.json, where transformers would zero its row by config.json.

    A trained or stored row is lost otherwise when plain transformers loads the folder that the model is saved to; with
    tied embeddings every token's probability changes.
    """
    if model.config.model_type in ZEROES_PADDING:
        model.config = deepcopy(model.config)
        model.config.pad_token_id = None


def freeze_as_constructed(model: Any) -> None:
    """Freeze the parameters that the family's constructor freezes: sinusoidal positions, and biases of MoE routers.

    transformers makes every loaded parameter trainable, except under ZeRO-3, where this is not needed.
    """
    with keeping_random_states(), torch.device("meta"):
        constructed = type(model)(deepcopy(model.config))
    for name, parameter in constructed.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad_(False)
