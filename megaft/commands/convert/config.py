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
    """Write a model's weights in another format, tensor by tensor. docs/convert.md describes the formats."""

    source: Annotated[str, tyro.conf.arg(name="from")]
    """A model folder, hub name or GGUF file, a converted folder, a run or its checkpoint, or classic Megatron-LM's."""
    to: Path
    """Folder to create; it must not exist."""
    format: Literal["hugging-face", "megatron"]
    """hugging-face is a folder that transformers loads; megatron has one file a tensor-parallel rank."""
    tensor_parallel_size: int = 1
    """Tensor-parallel size of the megatron format."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype that the weights are rounded to. By default they stay as they are."""
    model_config: str | None = None
    """For a checkpoint that does not say what model it is of: the folder or config.json of transformers' model."""
    verify: bool = False
    """Run both models on a text, on as many CPU processes as each has ranks, and compare what every token costs."""
    text: Path | None = None
    """Text file of --verify. By default a short built-in text."""

    def __post_init__(self) -> None:
        require_ranges(self, tensor_parallel_size=at_least(1).such_as("8"))
        require(is_unicode(str(self.to)), f"--to is {self.to!s}, which is not UTF-8; name another folder.")
        require(
            self.format == "megatron" or self.tensor_parallel_size == 1,
            f"--tensor-parallel-size is {self.tensor_parallel_size}, but --format hugging-face has no ranks; drop it.",
        )
        require(
            self.verify or self.text is None,
            f"--text is {self.text}, which has no effect without --verify; add that, or drop it.",
        )
