"""The settings of training: one dataclass a room, one flag a field.

The DeepSpeed JSON owns batch sizes, precision, ZeRO and clipping (see `deepspeed_json`); everything else is here.
Nothing in this file imports torch, so `--help` answers at once.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megaft.errors import ConfigError

# What a resumed run can be allowed to change; the other parts of its identity have no override.
CHANGEABLE = frozenset({"data", "tokenizer", "global_batch_size", "validation", "optim", "schedule_steps", "dropout"})


def require(rule_holds: bool, message: str) -> None:
    """Raise ConfigError with `message` unless the rule holds."""
    if not rule_holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model that is trained."""

    path: str | None = None
    """Pretrained model: a hub name, a folder, or a GGUF file."""
    from_scratch: str | None = None
    """Instead of --model.path: a config.json (or its folder) to initialise a new model from."""
    dropout: float | None = None
    """Every dropout probability of the model. By default as its own configuration says."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass: a third more work, less memory."""
    cross_entropy: Literal["chunked", "liger"] = "chunked"
    """How nats are computed without full logits: torch in chunks, or Liger's CUDA kernel (the [fast] extra)."""

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.from_scratch is None),
            f"model.path is {self.path} and model.from_scratch is {self.from_scratch}; give exactly one of the two.",
        )
        require(
            self.dropout is None or 0 <= self.dropout < 1,
            f"model.dropout is {self.dropout}; use 0 or more and less than 1, for example 0.1.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021) through PEFT: only they train, and the export has them merged."""

    rank: int = 0
    """Rank of the update of each adapted matrix; 0 trains the whole model."""
    alpha: int = 16
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: tuple[str, ...] = ()
    """Names of the adapted layers, such as q_proj v_proj. By default PEFT's choice for the architecture."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank is {self.rank}; use 0 for none, or for example 8.")
        require(self.alpha > 0, f"lora.alpha is {self.alpha}; use a number above 0, for example 16.")
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; use 0 or more and less than 1.")
        require(
            self.rank > 0 or (self.alpha, self.dropout, self.target_modules) == (16, 0, ()),
            "lora.rank is 0, so the other lora settings have no effect; give lora.rank, for example 8.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """What is trained on, and what is validated on."""

    train: tuple[str, ...]
    """A prepared prefix or a text file; or several as WEIGHT,PREFIX pairs, such as 0.7,books 0.3,wiki."""
    valid: str | None = None
    """A prepared prefix or a text file to validate on."""
    tokenizer: str | None = None
    """Hub name, folder, GGUF file or sentencepiece .model. By default the model's own."""
    context_length: int = 1024
    """Input tokens per sample."""
    sample: Literal["stream", "document"] = "stream"
    """Cut samples from the corpus as one stream of tokens, or give every document samples of its own."""
    attend_within_documents: bool = False
    """Keep attention and positions inside documents in a stream; a document's first token is then not scored."""
    detokenizer: str = "identity"
    """For text files: the detokenizer that undoes the corpus's tokenization, such as wikitext_megatron."""

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train is empty; give a text file or a prepared prefix.")
        require(
            self.context_length >= 2, f"data.context-length is {self.context_length}; use 2 or more, for example 1024."
        )
        require(
            not (self.attend_within_documents and self.sample == "document"),
            "data.attend-within-documents has no effect with data.sample document, whose samples never leave one.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its schedule. Biases and norms are never decayed."""

    name: Literal["adamw", "sgd", "adafactor", "apex-adamw"] = "adamw"
    """adamw is torch's, fused; apex-adamw is NVIDIA apex's FusedAdam; adafactor needs ZeRO 0 in fp32."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.999
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices and embeddings."""
    momentum: float = 0.0
    """SGD's momentum."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up, a function of the step alone."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_fraction: float = 0.1
    """The learning rate at the last step as a fraction of the peak (linear and cosine)."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.learning_rate) and self.learning_rate >= 0,
            f"optim.learning-rate is {self.learning_rate}; use a finite number of 0 or more, for example 1e-4.",
        )
        for name in ("beta1", "beta2", "momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} is {value}; use 0 or more and less than 1, for example 0.9.")
        require(self.weight_decay >= 0, f"optim.weight-decay is {self.weight_decay}; use 0 or more, for example 0.01.")
        require(self.epsilon > 0, f"optim.epsilon is {self.epsilon}; use a positive number, for example 1e-8.")
        require(self.warmup_steps >= 0, f"optim.warmup-steps is {self.warmup_steps}; use 0 or more, for example 100.")
        require(
            0 <= self.final_fraction <= 1,
            f"optim.final-fraction is {self.final_fraction}; use 0 to 1.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long the run is, what it keeps, and where."""

    dir: Path
    """The run's folder: metrics, checkpoints, export. The same command continues from its newest checkpoint."""
    max_steps: int | None = None
    """Optimizer steps. Give this or --run.epochs."""
    epochs: float | None = None
    """Passes over the training data."""
    seed: int = 0
    """Fixes the order of samples, new weights and dropout."""
    validate_every: int = 0
    """Steps between validations; 0 validates at step 0 and at the end only."""
    patience: int = 0
    """Stop after this many validations without improvement; 0 never does."""
    export: Literal["best", "last", "none"] = "best"
    """Which checkpoint becomes RUN/export: the best by validation, or the last."""
    max_minutes: float | None = None
    """Save and end with exit code 75 (requeue me) after the step in which so many minutes since the start are over."""
    timeout_minutes: float = 10.0
    """End with exit code 75 when other ranks have not been heard of for so long. Longer than any validation or save."""
    fresh: bool = False
    """Start over: checkpoints and metrics of an earlier run in the folder are removed."""

    def __post_init__(self) -> None:
        require(
            (self.max_steps is None) != (self.epochs is None),
            f"run.max-steps is {self.max_steps} and run.epochs is {self.epochs}; give exactly one of the two.",
        )
        require(
            self.max_steps is None or self.max_steps >= 1,
            f"run.max-steps is {self.max_steps}; use 1 or more, for example 1000.",
        )
        require(
            self.epochs is None or (math.isfinite(self.epochs) and self.epochs > 0),
            f"run.epochs is {self.epochs}; use a number above 0, for example 1.",
        )
        require(
            self.max_minutes is None or self.max_minutes > 0,
            f"run.max-minutes is {self.max_minutes}; use a number above 0, for example 230.",
        )
        require(
            math.isfinite(self.timeout_minutes) and self.timeout_minutes > 0,
            f"run.timeout-minutes is {self.timeout_minutes}; use a finite number above 0, for example 10.",
        )
        for name in ("validate_every", "patience", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"run.{name.replace('_', '-')} is {value}; use 0 or more.")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, and which are kept. The best by validation always is."""

    every: int = 0
    """Steps between checkpoints; 0 saves at the end only (and where validation improves)."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Keep also those whose step is a multiple of this; 0 keeps no more."""
    in_background: Annotated[bool, tyro.conf.arg(name="async")] = False
    """Copy the state to host memory and write it while training goes on."""
    allow_changed: tuple[str, ...] = ()
    """What a resumed run may do otherwise than its checkpoint says, by the name the refusal gives it, such as data."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every is {self.every}; use 0 or more.")
        require(self.keep_last >= 1, f"checkpoint.keep-last is {self.keep_last}; use 1 or more, for example 2.")
        require(self.keep_every >= 0, f"checkpoint.keep-every is {self.keep_every}; use 0 or more.")
        require(
            set(self.allow_changed) <= CHANGEABLE,
            f"checkpoint.allow-changed is {' '.join(self.allow_changed)}; use some of {' '.join(sorted(CHANGEABLE))}.",
        )


Policy = Literal["ignore", "stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """What happens when a step goes wrong; RUN/events.jsonl records each case.

    stop ends the run with exit code 5; skip leaves the weights as they were before the step; rewind goes back to the
    last checkpoint and leaves the step's samples out.
    """

    non_finite: Literal["stop", "skip", "rewind"] = "stop"
    """For a loss or gradient norm that is not finite."""
    spike: Policy = "ignore"
    """For a loss or gradient norm far above the recent ones."""
    spike_deviations: float = 8.0
    """How far above: robust standard deviations (1.4826 times the median distance) from the median of the window."""
    spike_window: int = 128
    """Steps that are compared with; a quarter of them must be there first."""
    max_overflows: int = 20
    """fp16 overflows in a row after which the run stops."""
    max_rewinds: int = 10
    """Rewinds after which the run stops."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.spike_deviations) and self.spike_deviations > 0,
            f"guard.spike-deviations is {self.spike_deviations}; use a finite number above 0, for example 8.",
        )
        for name, least in (("spike_window", 8), ("max_overflows", 1), ("max_rewinds", 1)):
            value = getattr(self, name)
            require(value >= least, f"guard.{name.replace('_', '-')} is {value}; use {least} or more.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Sliding-window validation: a prefix token, then every token of every document scored once."""

    context_length: int | None = None
    """Input tokens per forward pass. By default data.context-length."""
    stride: int | None = None
    """Tokens scored per window after the first. Smaller is slower and lowers perplexity. Default: half the context."""
    batch_size: int = 8
    """Windows per forward pass and rank."""

    def __post_init__(self) -> None:
        for name in ("context_length", "stride", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"eval.{name.replace('_', '-')} is {value}; use 1 or more.")


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Where metrics go besides RUN/metrics.jsonl, which is always written."""

    wandb: bool = False
    """Log to Weights & Biases (set WANDB_MODE=offline where there is no network)."""
    wandb_project: str = "megaft"
    """The Weights & Biases project."""
    tensorboard: bool = False
    """Write TensorBoard event files to RUN/tensorboard."""
    peak_flops: float | None = None
    """The device's dense peak in FLOP/s, for MFU. By default known for common GPUs, measured elsewhere."""

    def __post_init__(self) -> None:
        require(
            self.peak_flops is None or 0 < self.peak_flops < math.inf,
            f"metrics.peak-flops is {self.peak_flops}; use a finite number above 0, for example 989e12.",
        )
        require(
            self.wandb or self.wandb_project == "megaft",
            f"metrics.wandb-project is {self.wandb_project}, but metrics.wandb is off; switch it on.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Finetune a causal language model with DeepSpeed.

    The same command continues an interrupted run from its newest checkpoint.
    """

    deepspeed_config: Path
    """The DeepSpeed JSON: batch sizes, precision, ZeRO and clipping. ds_configs/ holds one a recipe."""
    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        has_validation = self.data.valid is not None
        require(
            has_validation or self.run.validate_every == 0,
            f"run.validate-every is {self.run.validate_every} but data.valid is not given; give both or neither.",
        )
        require(
            has_validation or self.eval == EvalConfig(),
            "eval settings have no effect without a text to validate on; give data.valid, or drop them.",
        )
        require(
            has_validation or self.run.patience == 0,
            f"run.patience is {self.run.patience} but data.valid is not given; patience counts validations.",
        )
        require(
            self.model.path is not None or self.data.tokenizer is not None,
            "model.from-scratch brings no tokenizer; give data.tokenizer.",
        )
        require(
            self.model.path is not None or self.lora.rank == 0,
            f"lora.rank is {self.lora.rank}, but a model from scratch has nothing to adapt; give model.path.",
        )
        stride = self.eval.stride or 1
        require(
            stride <= self.eval_context_length,
            f"eval.stride is {stride}; use 1 to {self.eval_context_length} (eval.context-length).",
        )

    @property
    def tokenizer_source(self) -> str:
        """Where the tokenizer is loaded from."""
        source = self.data.tokenizer or self.model.path
        assert source is not None, "checked above"
        return source

    @property
    def longest_input(self) -> int:
        """Tokens of the longest forward pass."""
        return max(self.data.context_length, self.eval_context_length)

    @property
    def eval_context_length(self) -> int:
        """Input tokens per window of validation."""
        return self.eval.context_length or self.data.context_length

    @property
    def eval_stride(self) -> int:
        """Tokens scored per later window of validation."""
        return self.eval.stride or max(1, self.eval_context_length // 2)


def parse_train(arguments: list[str] | None = None) -> TrainConfig:
    """The command line of `megaft/train.py`; exits with 2 and the rule on a bad one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # The deepspeed launcher appends --local_rank=N; the environment is what counts.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    return tyro.cli(TrainConfig, args=arguments, prog="megaft/train.py")
