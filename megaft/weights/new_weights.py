"""Initialize a new model's weights, each from the seed and its name, so that any rank can draw any of them."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from megaft.weights.families import family_of
from megaft.weights.parameters import Weights, shapes_of


def new_weights(config: Any, seed: int) -> Weights:
    """Return the weights of a new model of a transformers configuration, drawn when read.

    As in Radford et al. 2019 (section 2.3): biases are 0, norms are 1, and the rest is normal with the configuration's
    standard deviation, divided by sqrt(2 x layers) for GPT-2's projections into the residual stream.
    """
    shapes = shapes_of(config)
    return Weights(config, torch.float32, shapes, lambda name: _drawn(name, shapes[name], config, seed))


def generator_of(name: str, seed: int) -> torch.Generator:
    """Return the random generator of one parameter."""
    digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _drawn(name: str, shape: torch.Size, config: Any, seed: int) -> Tensor:
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    generator = generator_of(name, seed)
    deviation = config.initializer_range
    residual_outputs = family_of(config).residual_outputs
    if residual_outputs is not None and name.endswith(residual_outputs):
        deviation /= math.sqrt(2 * config.num_hidden_layers)
    return torch.empty(shape).normal_(0, deviation, generator=generator)
