"""Settings of `megaft tokenizer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megaft.base.checks import SEED, Range, at_least, require, require_ranges
from megaft.base.unicode_text import is_unicode
from megaft.config.prepare import ReadAs

Kind = Literal["bpe", "sentencepiece-bpe", "sentencepiece-unigram"]
"""Tokenizer algorithms: GPT-2's byte-level BPE, and sentencepiece's two."""
BYTE_PIECES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Train a tokenizer on text, and write a folder that megaft, transformers and Megatron load."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Text or JSON Lines files (plain, gzip, zstd, xz or bzip2), folders, or quoted globs."""
    output: Path
    """Folder to create; it must not exist."""
    kind: Kind = "bpe"
    """bpe: byte-level BPE, GPT-2's algorithm; sentencepiece-bpe and sentencepiece-unigram: sentencepiece's."""
    vocab_size: int = 50_257
    """Number of entries, with special tokens and control codes. BPE may reach fewer on a small text."""
    feed: Literal["documents", "lines"] = "documents"
    """bpe: what is tokenized as one text in training. With lines, no entry contains the end of a line."""
    format: ReadAs = "auto"
    """Input format: plain text, one JSON record per line, or detected from each file's content."""
    json_key: str = "text"
    """JSON records: key of the text."""
    end_of_text: str = "<|endoftext|>"
    """Special token that ends documents; it also serves as BOS and unknown token with bpe."""
    control_codes: tuple[str, ...] = ()
    """Special tokens that are added after the end of text, in this order."""
    min_frequency: int = 2
    """bpe: smallest number of occurrences of a merged pair."""
    max_bytes: int = 16_000_000_000
    """Train on a sample of at most this many bytes of text, taken evenly from all inputs. `tokenizers` counts pairs in
    32 bits, which overflow on about 70 GB of English."""
    model: str | None = None
    """Also write a config.json: a model of this shape (gpt2, gpt2-medium, smollm2-135m, ...) and this vocabulary."""
    pad_vocab_to: int = 1
    """With --model: round the model's vocabulary up to a multiple, for example 128."""
    json: bool = False
    """Print the receipt as the last line of stdout, in JSON."""

    def __post_init__(self) -> None:
        require(
            len(self.inputs) > 0,
            "megaft tokenizer train got no input; give text or JSON Lines files, folders or globs, for example "
            "`megaft tokenizer train corpus.txt --output tokenizer`.",
        )
        added = [self.end_of_text, *self.control_codes]
        _require_names("--end-of-text", [self.end_of_text])
        _require_names("--control-codes", self.control_codes)
        require(
            self.end_of_text not in self.control_codes,
            f"--control-codes has {self.end_of_text!r}, which is the end of text; drop it, or change --end-of-text.",
        )
        least = BYTE_PIECES + len(added) + (self.kind != "bpe") * 2
        require_ranges(
            self,
            vocab_size=Range(
                f"{least} to 1000000: one entry for each byte, the special tokens, and those learned",
                lambda value: least <= value <= 1_000_000,
            ),
            min_frequency=at_least(1),
            max_bytes=at_least(1000).such_as("1000000000"),
            pad_vocab_to=at_least(1).such_as("128"),
        )
        require(
            self.model is not None or self.pad_vocab_to == 1,
            f"--pad-vocab-to is {self.pad_vocab_to}, which pads a model's vocabulary; add --model, or drop it.",
        )
        require(
            self.kind == "bpe" or self.feed == "documents",
            f"--feed is {self.feed}, but sentencepiece always takes lines; drop it, or use --kind bpe.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """Measure a tokenizer on text: round trip, bytes and words per token, unused entries."""

    tokenizer: tyro.conf.Positional[str]
    """Hub name, folder, GGUF file or sentencepiece .model."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Text or JSON Lines files (plain, gzip, zstd, xz or bzip2), folders, or quoted globs."""
    beside: str | None = None
    """A second tokenizer, measured on the same text."""
    format: ReadAs = "auto"
    """Input format: plain text, one JSON record per line, or detected from each file's content."""
    json_key: str = "text"
    """JSON records: key of the text."""
    json: bool = False
    """Print one line of JSON instead of a table."""

    def __post_init__(self) -> None:
        require(
            len(self.inputs) > 0,
            "megaft tokenizer check got no text; give files, for example `megaft tokenizer check gpt2 corpus.txt`.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtendConfig:
    """Add special tokens, such as control codes, to a model: entries of its tokenizer, and rows of its matrices.

    Each new row is the mean of the old ones plus a little noise.
    """

    tokens: tyro.conf.Positional[tuple[str, ...]]
    """New special tokens, in the order of their ids."""
    model: str
    """Folder, hub name or run to extend, with its tokenizer."""
    output: Path
    """Folder to create; it must not exist."""
    pad_vocab_to: int = 1
    """Round the model's vocabulary up to a multiple, for example 128."""
    seed: int = 0
    """Random seed of the noise."""

    def __post_init__(self) -> None:
        require(
            len(self.tokens) > 0,
            "megaft tokenizer extend got no token; give new ones, for example "
            "`megaft tokenizer extend '<|books|>' --model gpt2 --output gpt2-codes`.",
        )
        _require_names("TOKENS", self.tokens)
        require_ranges(self, pad_vocab_to=at_least(1).such_as("128"), seed=SEED)


def _require_names(flag: str, names: Sequence[str]) -> None:
    for name in names:
        require(
            bool(name) and is_unicode(name) and not any(map(str.isspace, name)),
            f"{flag} is {name!r}; use a name without white space, for example <|books|>.",
        )
        require(names.count(name) == 1, f"{flag} has {name!r} more than once; drop one.")
