"""Dimensions of a language model, from which parameters, memory and FLOPs are computed. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Literal

from megaft.base.checks import require

ShapeCounts = Counter[tuple[int, ...]]
"""Number of parameters of each shape."""
MAX_RANKS = 64
"""Largest tensor-parallel size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """Dimensions of a decoder, and the kinds of its layers."""

    norm: Literal["LayerNorm", "RMSNorm"]
    is_gated: bool
    """True if the MLP is gated: three matrices, not two."""
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
    """Number of positions: the longest context."""
    is_tied: bool
    """True if the output layer is tied to the embedding."""
    has_qkv_bias: bool
    has_bias: bool
    """True if the other matrices of a layer have biases."""
    activation: str
    dropout: float
    """Dropout probability of the residual stream. Attention's is left out: fused kernels store no mask for it."""

    def parameter_shapes(self, tensor_parallel_size: int = 1, is_fused: bool = False) -> ShapeCounts:
        """Count the parameters of one tensor-parallel rank by shape.

        Args:
            tensor_parallel_size: Ranks over which matrices and the padded vocabulary are sharded.
            is_fused: Fuse queries, keys and values, and a gated MLP's two input matrices, as megatron-core does.
        """
        size = tensor_parallel_size
        rows = -(-self.vocab_size // size)
        shapes: ShapeCounts = Counter({(rows, self.width): 1 if self.is_tied else 2})
        if self.has_position_embedding:
            shapes[(self.num_positions, self.width)] += 1
        shapes[(self.width,)] += self._norm_vectors_per_layer // 2
        for shape in self.matrices_of_layer(size, is_fused):
            shapes[shape] += self.num_layers
        for length in self._vectors(size, is_fused):
            shapes[(length,)] += self.num_layers
        return shapes

    def matrices_in_order(self, tensor_parallel_size: int = 1, is_fused: bool = False) -> tuple[int, ...]:
        """Return the number of elements of each of a rank's matrices, in the order of its modules."""
        embedding = -(-self.vocab_size // tensor_parallel_size) * self.width
        before = [embedding, self.num_positions * self.width] if self.has_position_embedding else [embedding]
        layer = [prod(shape) for shape in self.matrices_of_layer(tensor_parallel_size, is_fused)]
        return (*before, *layer * self.num_layers, *([] if self.is_tied else [embedding]))

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model, counting tied ones once."""
        return num_elements(self.parameter_shapes())

    def require_shardable(self, size: int, setting: str) -> None:
        """Raise ConfigError unless `size` ranks can shard groups and MLPs evenly, and each has vocabulary rows.

        Args:
            size: Tensor-parallel size.
            setting: Its setting's name in messages.
        """
        valid = [ranks for ranks in range(1, MAX_RANKS + 1) if self._can_shard(ranks)]
        require(
            size in valid,
            f"{setting} is {size}, but the model's {self.num_groups} KV heads and MLP width of "
            f"{self.inner_width} are not both divisible by {size}, or its {self.vocab_size} vocabulary entries are too "
            f"few for {size} ranks; use one of {', '.join(map(str, valid))}.",
        )

    def _can_shard(self, size: int) -> bool:
        has_rows = (size - 1) * -(-self.vocab_size // size) < self.vocab_size
        return has_rows and self.num_groups % size == self.inner_width % size == 0

    @property
    def _norm_vectors_per_layer(self) -> int:
        return 4 if self.norm == "LayerNorm" else 2  # weights, and a LayerNorm's biases

    def _outputs(self, size: int, is_fused: bool) -> list[list[int]]:
        """Output widths of the column-parallel matrices of attention and of the MLP."""
        query, key = self.num_heads * self.head_width // size, self.num_groups * self.head_width // size
        inner = self.inner_width // size
        if not self.is_gated:
            return [[query + 2 * key], [inner]]
        return [[query + 2 * key], [2 * inner]] if is_fused else [[query, key, key], [inner, inner]]

    def matrices_of_layer(self, size: int = 1, is_fused: bool = False) -> list[tuple[int, int]]:
        """Return the shapes (out, in) of a layer's matrices on one of `size` tensor-parallel ranks."""
        attention, inner = self._outputs(size, is_fused)
        attention_in = [(out, self.width) for out in attention]
        projection = [(self.width, self.num_heads * self.head_width // size)]
        mlp = [*((out, self.width) for out in inner), (self.width, self.inner_width // size)]
        first = projection + attention_in if is_fused else attention_in + projection  # megatron-core's order of modules
        return [*first, *mlp]

    def _vectors(self, size: int, is_fused: bool) -> list[int]:
        attention, inner = self._outputs(size, is_fused)
        norms = [self.width] * self._norm_vectors_per_layer
        biases = [*inner, self.width, self.width] if self.has_bias else []
        return [*norms, *biases, *(attention if self.has_qkv_bias else [])]


def num_elements(shapes: ShapeCounts) -> int:
    """Return the number of elements of all parameters."""
    return sum(prod(shape) * number for shape, number in shapes.items())


def flops_per_token(num_parameters: int, num_layers: int, hidden_size: int, context_length: int) -> int:
    """Return the floating-point operations of training on one token, 6N + 12LdT (PaLM, appendix B).

    Counts forward and backward without recomputation of activations, and takes no savings for the causal mask.
    """
    return 6 * num_parameters + 12 * num_layers * hidden_size * context_length
