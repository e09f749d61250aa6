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
    """Sample only from the k most likely tokens; 0 samples from all."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of tokens whose probabilities sum to this; 1 samples from all."""
    repetition_penalty: float = 1.0
    """Values above 1 make tokens that have already occurred less likely; 1 has no effect."""

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
    """Generate text: continue prompts, or answer chats."""

    model: str
    """Run folder, model folder, hub name or GGUF file."""
    prompt: tuple[str, ...] = ()
    """One or more texts to continue, each independently, from the same seed. The tokenizer's beginning-of-sequence
    token, if it adds one, is put before a text that does not already start with it."""
    chat: tuple[str, ...] = ()
    """Instead of --prompt: one or more user messages to answer, each a separate chat, in the chat template."""
    messages: tuple[str, ...] = ()
    """Instead of --prompt: one or more chats to answer, each a JSON list of objects with a role and a content."""
    max_new_tokens: int = 100
    """Largest number of new tokens per prompt. Beyond the model's context length the oldest tokens are dropped."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    seed: int = 0
    """Random seed for sampling."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's computation."""
    backend: Backend | None = None
    """Model implementation. By default hugging-face, or megatron for a folder in megatron's format."""
    tensor_parallel_size: int = 1
    """Ranks over which each matrix is sharded (megatron): the number that `torchrun -m megaft generate` starts."""
    ignore_eos: bool = False
    """Continue past end tokens: those of generation_config.json (else config.json), and the tokenizer's."""
    json: bool = False
    """Print one JSON object per prompt instead of the text."""

    def __post_init__(self) -> None:
        given = {name: texts for name in ("prompt", "chat", "messages") if (texts := getattr(self, name))}
        require(len(given) > 0, "--prompt is empty; give a text to continue, or a chat to answer (--chat, --messages).")
        require(len(given) == 1, f"{' and '.join(f'--{name}' for name in given)} are given; use one of them.")
        for name, text in ((name, text) for name, texts in given.items() for text in texts):
            require(is_unicode(text), f"--{name} is {text!r}, which has bytes that are not UTF-8; give UTF-8 text.")
        require_ranges(self, max_new_tokens=at_least(1).such_as("100"), seed=SEED)
        require_ranges(self, tensor_parallel_size=at_least(1).such_as("8"))
