"""Keep loaded weights unchanged and frozen parameters frozen in transformers families that alter them."""

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
from megaft.weights.loading.trial_model import keeping_random_states

ZEROES_PADDING = ("youtu",)
"""Families whose embedding's padding row transformers sets to zero at every load."""


@contextmanager
def keeping_stored_weights() -> Iterator[None]:
    """Initialize only modules with a tensor that was not loaded, such as a non-persistent buffer.

    transformers relies on each family to keep loaded weights. Youtu still zeroes its embedding's padding row, and some
    families depend on the shapes of weights that ZeRO-3 has already partitioned.
    """
    original = PreTrainedModel._initialize_weights

    def initialize(self: Any, module: nn.Module, is_custom_code: bool = False) -> None:
        if not _is_loaded(module):
            original(self, module, is_custom_code)

    with replaced(PreTrainedModel, "_initialize_weights", initialize):
        yield


def _is_loaded(module: nn.Module) -> bool:
    """Return True if transformers has marked every tensor of a module and its children as loaded."""
    return all(getattr(tensor, "_is_hf_initialized", False) for tensor in chain(module.parameters(), module.buffers()))


def keep_padding_row(model: Any) -> None:
    """Remove pad_token_id from config.json, leaving it in generation_config.json, to keep its row.

    Otherwise transformers zeroes the row when it loads the saved folder; with tied embeddings that changes every
    token's probability.
    """
    if model.config.model_type in ZEROES_PADDING:
        model.config = deepcopy(model.config)
        model.config.pad_token_id = None


def freeze_as_constructed(model: Any) -> None:
    """Freeze the parameters that the family's constructor freezes: sinusoidal positions and MoE router biases.

    Needed except under ZeRO-3, because transformers makes every loaded parameter trainable.
    """
    with keeping_random_states(), torch.device("meta"):
        constructed = type(model)(deepcopy(model.config))
    for name, parameter in constructed.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad_(False)
