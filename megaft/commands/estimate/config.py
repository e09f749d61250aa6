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
    """Estimate a run without a GPU: memory per rank, settings that would make it fit, speed, duration and disk space.

    The exit code is 0 even if the run does not fit.
    """

    model: str
    """A model folder, a run folder, or a name such as gpt2-xl, megatron-8.3b, llama-3.1-8b, smollm2-135m."""
    deepspeed_config: Path
    """DeepSpeed JSON of the run."""
    world_size: int = 1
    """Number of ranks, one per GPU."""
    tensor_parallel_size: int = 1
    """Ranks over which each matrix is sharded; needs --backend megatron."""
    context_length: int = 1024
    """Input tokens per sample."""
    hardware: str = "h100"
    """GPU type: h100, h200, b200, a100, a100-40gb, l40s, a6000, rtx4090, v100, v100-32gb, t4."""
    backend: Backend = "hugging-face"
    """Model implementation, as --model.backend."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and recompute the rest, as --model.activation-checkpointing."""
    attend_within_documents: bool = False
    """Keep documents apart by a mask, as --data.attend-within-documents; it decides the attention kernel."""
    dropout: float | None = None
    """Dropout probability for the whole model. By default that of its configuration."""
    tokens: float | None = None
    """Number of training tokens, such as 1e9, to estimate the duration."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer, whose moments take memory, as --optim.* of training."""
    json: bool = False
    """Print one line of JSON instead of a table."""

    def __post_init__(self) -> None:
        require(self.hardware in GPUS, f"--hardware is {self.hardware}; use one of {', '.join(GPUS)}.")
        one = at_least(1)
        require_ranges(self, world_size=one, tensor_parallel_size=one, context_length=one)
        require_ranges(self, dropout=BELOW_1.such_as("0.1"), tokens=ABOVE_0.such_as("1e9"))
