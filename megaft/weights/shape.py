"""Shapes of a language model, from which parameters, memory and FLOPs follow. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Literal

from megaft.base.checks import require

Weights = Counter[tuple[int, ...]]
"""Number of parameters of each shape."""
MAX_RANKS = 64
"""Largest tensor-parallel size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Sizes of a decoder and the kinds of its layers."""

    norm: Literal["LayerNorm", "RMSNorm"]
    is_gated: bool
    """True if the inner layer is gated: three matrices, not two."""
    has_position_embedding: bool
    """True for learned positions, False for rotary ones."""
    num_layers: int
    width: int
    num_heads: int
    num_groups: int
    """Key and value heads, each shared by num_heads / num_groups query heads."""
    head_width: int
    inner_width: int
    vocab_size: int
    num_positions: int
    """Positions of the model, its longest context."""
    is_tied: bool
    """True if the output layer is tied to the embedding."""
    has_qkv_bias: bool
    has_bias: bool
    """True if the other matrices of a layer have biases."""
    activation: str
    dropout: float
    """Dropout of the residual stream. Fused kernels draw attention's again in the backward pass."""

    def weights(self, tensor_parallel_size: int = 1, is_fused: bool = False) -> Weights:
        """Return the parameters of one tensor-parallel rank.

        Args:
            tensor_parallel_size: Ranks over which matrices are cut, and the vocabulary, filled up to a multiple.
            is_fused: Queries, keys and values are one matrix, and a gated layer's two inputs: megatron-core's way.
        """
        size = tensor_parallel_size
        words = -(-self.vocab_size // size)
        found: Weights = Counter({(words, self.width): 1 if self.is_tied else 2})
        if self.has_position_embedding:
            found[(self.num_positions, self.width)] += 1
        found[(self.width,)] += self._norms_per_layer // 2
        for shape in self._matrices(size, is_fused):
            found[shape] += self.num_layers
        for length in self._vectors(size, is_fused):
            found[(length,)] += self.num_layers
        return found

    def matrices_in_order(self, tensor_parallel_size: int = 1, is_fused: bool = False) -> tuple[int, ...]:
        """Return the elements of a rank's matrices, in the order in which its modules list them."""
        words = -(-self.vocab_size // tensor_parallel_size) * self.width
        before = [words, self.num_positions * self.width] if self.has_position_embedding else [words]
        layer = [prod(shape) for shape in self._matrices(tensor_parallel_size, is_fused)]
        return (*before, *layer * self.num_layers, *([] if self.is_tied else [words]))

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return num_elements(self.weights())

    def require_shardable(self, size: int, setting: str) -> None:
        """Raise ConfigError unless each of `size` ranks gets whole attention groups, equal parts of layers, and words.

        Args:
            size: Ranks that share each matrix.
            setting: The user's name for that number.
        """
        able = [ranks for ranks in range(1, MAX_RANKS + 1) if self._can_shard(ranks)]
        require(
            size in able,
            f"{setting} is {size}, but the model's {self.num_groups} attention groups and inner width of "
            f"{self.inner_width} do not divide by it, or its {self.vocab_size} words leave a rank without any; "
            f"use one of {', '.join(map(str, able))}.",
        )

    def _can_shard(self, size: int) -> bool:
        has_words = (size - 1) * -(-self.vocab_size // size) < self.vocab_size
        return has_words and self.num_groups % size == self.inner_width % size == 0

    @property
    def _norms_per_layer(self) -> int:
        return 4 if self.norm == "LayerNorm" else 2  # weights, and a LayerNorm's biases

    def _outputs(self, size: int, is_fused: bool) -> list[list[int]]:
        """Widths of the layer's inputs to attention and to the inner layer, cut by columns."""
        query, key = self.num_heads * self.head_width // size, self.num_groups * self.head_width // size
        inner = self.inner_width // size
        if not self.is_gated:
            return [[query + 2 * key], [inner]]
        return [[query + 2 * key], [2 * inner]] if is_fused else [[query, key, key], [inner, inner]]

    def _matrices(self, size: int, is_fused: bool) -> list[tuple[int, int]]:
        attention, inner = self._outputs(size, is_fused)
        of_attention = [(out, self.width) for out in attention]
        projection = [(self.width, self.num_heads * self.head_width // size)]
        of_inner = [*((out, self.width) for out in inner), (self.width, self.inner_width // size)]
        first = projection + of_attention if is_fused else of_attention + projection  # as megatron-core makes them
        return [*first, *of_inner]

    def _vectors(self, size: int, is_fused: bool) -> list[int]:
        attention, inner = self._outputs(size, is_fused)
        norms = [self.width] * self._norms_per_layer
        biases = [*inner, self.width, self.width] if self.has_bias else []
        return [*norms, *biases, *(attention if self.has_qkv_bias else [])]


def num_elements(weights: Weights) -> int:
    """Return the number of elements."""
    return sum(prod(shape) * number for shape, number in weights.items())


def flops_per_token(num_parameters: int, num_layers: int, hidden_size: int, context_length: int) -> int:
    """Return the floating-point operations of training on one token, 6N + 12LdT (PaLM, appendix B).

    Forward and backward of the model as it is: recomputed activations do not count, and a causal mask saves nothing.
    """
    return 6 * num_parameters + 12 * num_layers * hidden_size * context_length
