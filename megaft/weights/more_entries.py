"""Give a model's embedding and output layer rows for new vocabulary entries."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from megaft.weights.families import family_of
from megaft.weights.layout import OUTPUT_LAYER
from megaft.weights.new_weights import generator_of
from megaft.weights.parameters import Weights

NOISE = 1e-5
"""Standard deviation of the noise that tells new rows apart."""


def with_entries(weights: Weights, num_old: int, vocab_size: int, seed: int) -> Weights:
    """Return a model's weights with a vocabulary of `vocab_size` entries, of which the first `num_old` stay.

    The other rows are the mean of these plus noise. A new token then has about the logit of an average one, which
    changes the probabilities of the old ones little; rows of random size could dominate them.

    Args:
        weights: The model; its vocabulary may already have rows of padding after the first `num_old`.
        num_old: Entries of its tokenizer.
        vocab_size: Entries afterwards.
        seed: Seed of the noise.
    """
    matrices = {family_of(weights.config).embedding, OUTPUT_LAYER} & weights.shapes.keys()
    resized = {name: torch.Size((vocab_size, *weights.shapes[name][1:])) for name in matrices}
    config = copy.deepcopy(weights.config)
    config.vocab_size = vocab_size

    def fetch(name: str) -> Tensor:
        stored = weights.fetch(name)
        return with_rows(stored[:num_old], vocab_size, generator_of(name, seed)) if name in matrices else stored

    return replace(weights, config=config, shapes=weights.shapes | resized, fetch=fetch)


def with_rows(
    matrix: Float[Tensor, "old width"], num_rows: int, generator: torch.Generator
) -> Float[Tensor, "rows width"]:
    """Return the matrix, followed by its mean row plus noise up to `num_rows` rows."""
    noise = torch.empty(num_rows - len(matrix), matrix.shape[1]).normal_(0, NOISE, generator=generator)
    return torch.cat([matrix, (matrix.float().mean(0) + noise).to(matrix.dtype)])
