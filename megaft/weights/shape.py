"""Shapes of a language model, from which parameters, memory and FLOPs follow. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from megaft.base.checks import require
from megaft.weights.sizes import Sizes

Weights = Counter[tuple[int, ...]]
"""Number of parameters of each shape."""
LLAMAS = ("llama", "mistral", "qwen2")
MAX_RANKS = 64
"""Largest tensor-parallel size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A GPT-2 (LayerNorm, learned positions, biases) or a Llama (RMSNorm, rotary positions, gated inner layer)."""

    family: Literal["gpt2", "llama"]
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

    @classmethod
    def of(cls, config: dict[str, Any], dropout: float | None = None, source: str = "config.json") -> Shape:
        """Read a transformers configuration; what it leaves out has transformers' default.

        Args:
            config: As in config.json.
            dropout: In place of the configuration's own.
            source: Where it is from, for messages.

        Raises:
            ConfigError: A family whose sizes are not known here.
            DataError: Sizes that make no model.
        """
        kind = config.get("model_type")
        require(
            kind == "gpt2" or kind in LLAMAS,
            f"the model's model_type is {kind}; megaft estimate knows gpt2, {', '.join(LLAMAS)}.",
        )
        sizes = Sizes(config, source)
        return _gpt2(sizes, dropout) if kind == "gpt2" else _llama(sizes, str(kind))

    def weights(self, tensor_parallel_size: int = 1, is_fused: bool = False) -> Weights:
        """Return the parameters of one tensor-parallel rank.

        Args:
            tensor_parallel_size: Ranks over which matrices are cut, and the vocabulary, filled up to a multiple.
            is_fused: Queries, keys and values are one matrix, and a gated layer's two inputs: megatron-core's way.
        """
        size = tensor_parallel_size
        words = -(-self.vocab_size // size)
        found: Weights = Counter({(words, self.width): 1 if self.is_tied else 2})
        if self.family == "gpt2":
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
        before = [words, self.num_positions * self.width] if self.family == "gpt2" else [words]
        layer = [prod(shape) for shape in self._matrices(tensor_parallel_size, is_fused)]
        return (*before, *layer * self.num_layers, *([] if self.is_tied else [words]))

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, tied ones once."""
        return count(self.weights())

    @property
    def _norms_per_layer(self) -> int:
        return 4 if self.family == "gpt2" else 2

    def _outputs(self, size: int, is_fused: bool) -> list[list[int]]:
        """Widths of the layer's inputs to attention and to the inner layer, cut by columns."""
        query, key = self.num_heads * self.head_width // size, self.num_groups * self.head_width // size
        inner = self.inner_width // size
        is_gated = self.family == "llama"
        attention = [query + 2 * key] if is_fused or not is_gated else [query, key, key]
        return [attention, [inner * (1 + is_gated)] if is_fused or not is_gated else [inner, inner]]

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


def count(weights: Weights) -> int:
    """Return the number of elements."""
    return sum(prod(shape) * number for shape, number in weights.items())


def flops_per_token(num_parameters: int, num_layers: int, hidden_size: int, context_length: int) -> int:
    """Return the floating-point operations of training on one token, 6N + 12LdT (PaLM, appendix B).

    Forward and backward of the model as it is: recomputed activations do not count, and a causal mask saves nothing.
    """
    return 6 * num_parameters + 12 * num_layers * hidden_size * context_length


def require_cuttable(groups: int, inner_width: int, words: int, size: int, setting: str) -> None:
    """Raise ConfigError unless every rank gets whole attention groups, as much of each layer as others, and words.

    Args:
        groups: Attention groups of the model.
        inner_width: Of its inner layers.
        words: Of its vocabulary.
        size: Ranks that share each matrix.
        setting: What the user calls that number.
    """
    able = [
        ranks
        for ranks in range(1, MAX_RANKS + 1)
        if groups % ranks == inner_width % ranks == 0 and (ranks - 1) * -(-words // ranks) < words
    ]
    require(
        size in able,
        f"{setting} is {size}, but the model's {groups} attention groups and inner width of {inner_width} do not "
        f"divide by it, or its {words} words leave a rank without any; use one of {', '.join(map(str, able))}.",
    )


def _gpt2(sizes: Sizes, dropout: float | None) -> Shape:
    width, heads = sizes.whole("n_embd", 768), sizes.whole("n_head", 12)
    sizes.require_multiple("n_embd", width, "n_head", heads)
    own_dropout = sizes.share("resid_pdrop", 0.1)
    return Shape(
        family="gpt2",
        num_layers=sizes.whole("n_layer", 12),
        width=width,
        num_heads=heads,
        num_groups=heads,
        head_width=width // heads,
        inner_width=sizes.whole("n_inner", 4 * width, null=4 * width),
        vocab_size=sizes.whole("vocab_size", 50_257),
        num_positions=sizes.whole("n_positions", 1024),
        is_tied=sizes.flag("tie_word_embeddings", True),
        has_qkv_bias=True,
        has_bias=True,
        activation=sizes.config.get("activation_function", "gelu_new"),
        dropout=own_dropout if dropout is None else dropout,
    )


def _llama(sizes: Sizes, kind: str) -> Shape:
    width, heads = sizes.whole("hidden_size", 4096), sizes.whole("num_attention_heads", 32)
    if sizes.config.get("head_dim") is None:
        sizes.require_multiple("hidden_size", width, "num_attention_heads", heads)
    groups = sizes.whole("num_key_value_heads", {"mistral": 8, "qwen2": 32, "llama": heads}[kind], null=heads)
    sizes.require_multiple("num_attention_heads", heads, "num_key_value_heads", groups)
    has_bias = sizes.flag("attention_bias", False)
    return Shape(
        family="llama",
        num_layers=sizes.whole("num_hidden_layers", 32),
        width=width,
        num_heads=heads,
        num_groups=groups,
        head_width=sizes.whole("head_dim", width // heads, null=width // heads),
        inner_width=sizes.whole("intermediate_size", 11_008),
        vocab_size=sizes.whole("vocab_size", 32_000),
        num_positions=sizes.whole("max_position_embeddings", 2048),
        is_tied=sizes.flag("tie_word_embeddings", False),
        has_qkv_bias=kind == "qwen2" or has_bias,
        has_bias=has_bias and kind != "qwen2",
        activation=sizes.config.get("hidden_act", "silu"),
        dropout=0.0,
    )
