"""Settings of `megaft generate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from megaft.base.checks import NOT_NEGATIVE, SEED, Range, at_least, require, require_ranges
from megaft.base.unicode_text import is_unicode
from megaft.config.parallelism import Backend


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Sampling of the next token."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this; 1 draws from all."""
    repetition_penalty: float = 1.0
    """Makes tokens seen before less likely where above 1; 1 does nothing."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            temperature=NOT_NEGATIVE.such_as("0.8"),
            top_k=at_least(0).such_as("50"),
            top_p=Range("more than 0 and at most 1, for example 0.95", lambda value: 0 < value <= 1),
            repetition_penalty=Range("0.001 to 1000, for example 1.2", lambda value: 0.001 <= value <= 1000),
        )
        require(
            self.temperature > 0 or (self.top_k == 0 and self.top_p == 1),
            f"--top-k is {self.top_k} and --top-p is {self.top_p}, which have no effect at --temperature 0; drop them.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Continue each text, or answer each chat, with a model."""

    model: str
    """A run's folder, a model folder, a hub name or a GGUF file."""
    prompt: tuple[str, ...] = ()
    """One text to continue, or several. Each is continued by itself, from the same seed. The special tokens that the
    tokenizer puts before a text (the beginning-of-sequence token) are put before it, unless it spells them itself."""
    chat: tuple[str, ...] = ()
    """In place of prompts: a user's message to answer, or several, each a chat of its own. The tokenizer's chat
    template renders it, and alone decides how it begins."""
    messages: tuple[str, ...] = ()
    """In place of prompts: a chat to answer, or several, each a JSON list of objects with a role and a content."""
    max_new_tokens: int = 100
    """Tokens after the prompt, unless the model ends the text before. Beyond its context it forgets the oldest."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    seed: int = 0
    """Seed of every draw."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's computation."""
    backend: Backend | None = None
    """Model implementation. By default transformers, or megatron-core for a folder in megatron's format."""
    tensor_parallel_size: int = 1
    """Ranks that share each matrix, with megatron-core's modules: all that `torchrun -m megaft generate` starts."""
    ignore_eos: bool = False
    """Go on at end tokens: those of generation_config.json (else config.json), and the tokenizer's."""
    json: bool = False
    """Print one JSON object a prompt instead of the text."""

    def __post_init__(self) -> None:
        given = {name: texts for name in ("prompt", "chat", "messages") if (texts := getattr(self, name))}
        require(len(given) > 0, "--prompt is empty; give a text to continue, or a chat to answer (--chat, --messages).")
        require(len(given) == 1, f"{' and '.join(f'--{name}' for name in given)} are given; use one of them.")
        for name, text in ((name, text) for name, texts in given.items() for text in texts):
            require(is_unicode(text), f"--{name} is {text!r}, which has bytes that are not UTF-8; give UTF-8 text.")
        require_ranges(self, max_new_tokens=at_least(1).such_as("100"), seed=SEED)
        require_ranges(self, tensor_parallel_size=at_least(1).such_as("8"))
