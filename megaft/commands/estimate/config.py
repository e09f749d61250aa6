"""Settings of `megaft estimate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megaft.base.checks import ABOVE_0, BELOW_1, at_least, require, require_ranges
from megaft.base.hardware import GPUS
from megaft.config.parallelism import Backend
from megaft.config.train import OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class EstimateConfig:
    """Estimate a run: memory of each rank, changes that would make it fit, speed, days and disk.

    Exit code 0, also where it does not fit.
    """

    model: str
    """A folder with a config.json, or a name such as gpt2-xl, megatron-8.3b, llama-3.1-8b, smollm2-135m."""
    deepspeed_config: Path
    """The DeepSpeed JSON, read as training reads it."""
    world_size: int = 1
    """Ranks, one a GPU."""
    tensor_parallel_size: int = 1
    """Ranks that share each matrix (backend megatron)."""
    context_length: int = 1024
    """Input tokens per sample."""
    hardware: str = "h100"
    """The GPU: h100, h200, b200, a100, a100-40gb, l40s, a6000, rtx4090, v100, v100-32gb, t4."""
    backend: Backend = "hugging-face"
    """Model implementation, as --model.backend."""
    activation_checkpointing: bool = False
    """Each layer keeps its input only, as --model.activation-checkpointing."""
    dropout: float | None = None
    """Every dropout probability of the model. By default as its own configuration says."""
    tokens: float | None = None
    """Tokens to train on, for the days that takes; such as 1e9."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    json: bool = False
    """Print one line of JSON instead of a table."""

    def __post_init__(self) -> None:
        require(self.hardware in GPUS, f"--hardware is {self.hardware}; use one of {', '.join(GPUS)}.")
        one = at_least(1)
        require_ranges(self, world_size=one, tensor_parallel_size=one, context_length=one)
        require_ranges(self, dropout=BELOW_1.such_as("0.1"), tokens=ABOVE_0.such_as("1e9"))
