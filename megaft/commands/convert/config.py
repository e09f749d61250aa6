"""Settings of `megaft convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megaft.base.checks import at_least, require, require_ranges
from megaft.base.unicode_text import is_unicode


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    """Convert a model's weights to another format, tensor-parallel size or dtype. See docs/convert.md."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """Model to convert: a folder, hub name, GGUF file, training run, or checkpoint of megaft or classic Megatron-LM."""
    to: Path
    """Folder to create; it must not exist."""
    format: Literal["hugging-face", "megatron"]
    """hugging-face: a folder that transformers loads; megatron: one file per tensor-parallel rank."""
    tensor_parallel_size: int = 1
    """Number of tensor-parallel shards, in the megatron format."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the converted weights. By default the dtype of the source."""
    model_config: str | None = None
    """transformers model folder or config.json, for a checkpoint that does not describe its model."""
    verify: bool = False
    """Run both models on a text on CPU, with one process per tensor-parallel rank, and compare each token's nats."""
    text: Path | None = None
    """Text file for --verify. By default a short built-in text."""

    def __post_init__(self) -> None:
        require_ranges(self, tensor_parallel_size=at_least(1).such_as("8"))
        require(is_unicode(str(self.to)), f"--to is {self.to!s}, which is not UTF-8; use another folder name.")
        require(
            self.format == "megatron" or self.tensor_parallel_size == 1,
            f"--tensor-parallel-size is {self.tensor_parallel_size}, but --format hugging-face has no shards; drop it.",
        )
        require(
            self.verify or self.text is None,
            f"--text is {self.text}, which has no effect without --verify; add --verify, or drop --text.",
        )
