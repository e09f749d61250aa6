"""Settings of training: one dataclass per group, one flag per field.

The DeepSpeed JSON owns batch sizes, precision, ZeRO and clipping (see `deepspeed_json`); everything else is here.
Nothing in this file imports torch, so `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megaft.base.checks import ABOVE_0, BELOW_1, NOT_NEGATIVE, SEED, UP_TO_1, at_least, require, require_ranges
from megaft.base.topology import own_flags
from megaft.base.unicode_text import is_unicode
from megaft.config.abbreviations import suggesting
from megaft.config.detokenizer import require_detokenizer
from megaft.config.identity import CHANGEABLE
from megaft.config.optimizers import HELP, OPTIMIZERS, OptimizerName
from megaft.config.parallelism import Backend, require_shardable
from megaft.config.policies import POLICIES, NonFinitePolicy, SpikePolicy
from megaft.config.schedules import SCHEDULES, ScheduleName


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model to train."""

    path: str | None = None
    """Pretrained model: a hub name, a folder or a GGUF file."""
    from_scratch: str | None = None
    """Initialize a new model from this config.json (or its folder), instead of loading --model.path."""
    backend: Backend = "hugging-face"
    """Model implementation: transformers, or megatron-core, which supports tensor parallelism."""
    dropout: float | None = None
    """Dropout probability, for every dropout layer. By default the values in the model's configuration."""
    activation_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, a third more compute."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile each block with torch.compile. auto: on a GPU below ZeRO stage 3, for families known to compile."""

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.from_scratch is None),
            f"--model.path is {self.path} and --model.from-scratch is {self.from_scratch}; set exactly one of them.",
        )
        require_ranges(self, "model.", dropout=BELOW_1.such_as("0.1"))
        require(
            self.backend == "hugging-face" or self.compile != "on",
            "--model.compile is on, which --model.backend megatron does not support. Use --model.compile off.",
        )

    @property
    def source(self) -> str:
        """Source of the model: of its weights, or of its architecture if it is new."""
        return str(self.path or self.from_scratch)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Tensor parallelism; ZeRO is set in the DeepSpeed JSON."""

    tensor_parallel_size: int = 1
    """Neighboring ranks that shard each weight matrix and process the same samples. Must divide the world size."""

    def __post_init__(self) -> None:
        require_ranges(self, "parallel.", tensor_parallel_size=at_least(1).such_as("8"))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """LoRA (Hu et al. 2021) through PEFT. Only the adapters train; the exported model has them merged."""

    rank: int = 0
    """Rank of each adapter; 0 disables LoRA and trains all weights."""
    alpha: int = 16
    """Scaling numerator: the adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability on each adapter's input."""
    target_modules: tuple[str, ...] = ()
    """Modules to adapt, such as q_proj v_proj. By default PEFT's choice for the architecture."""

    def __post_init__(self) -> None:
        require_ranges(self, "lora.", rank=at_least(0).such_as("8"), alpha=at_least(1).such_as("16"), dropout=BELOW_1)
        require(
            self.rank > 0 or (self.alpha, self.dropout, self.target_modules) == (16, 0, ()),
            "--lora.rank is 0, so the other --lora.* have no effect. Set --lora.rank, for example to 8.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training and validation data."""

    train: tuple[str, ...]
    """Prefix of a prepared dataset, or a text file. For a mixture, WEIGHT,PREFIX pairs such as 0.7,books 0.3,wiki."""
    valid: str | None = None
    """Validation data: prefix of a prepared dataset, or a text file."""
    tokenizer: str | None = None
    """Tokenizer: hub name, folder, GGUF file or sentencepiece .model. By default the model's own."""
    context_length: int = 1024
    """Sequence length: input tokens per sample."""
    sample: Literal["stream", "document"] = "stream"
    """stream: join documents, split every --data.context-length tokens; document: start a sample at every document."""
    attend_within_documents: bool = False
    """In packed samples, confine attention and positions to documents; a document's first token is not scored."""
    detokenizer: str = "identity"
    """Detokenizer for text files that are word-tokenized, such as wikitext_megatron for WikiText."""

    def __post_init__(self) -> None:
        require_detokenizer("--data.detokenizer", self.detokenizer)
        require(len(self.train) > 0, "--data.train is empty. Give a text file or the prefix of a prepared dataset.")
        require_ranges(self, "data.", context_length=at_least(2).such_as("1024"))
        require(
            not (self.attend_within_documents and self.sample == "document"),
            "--data.attend-within-documents has no effect with --data.sample document. Remove one of them.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Optimizer and learning-rate schedule. Weight decay skips biases and norms."""

    name: Annotated[OptimizerName, tyro.conf.arg(help=HELP["name"])] = "adamw"
    learning_rate: float = 1e-4
    """Peak learning rate."""
    beta1: Annotated[float, tyro.conf.arg(help=HELP["beta1"])] = 0.9
    beta2: Annotated[float, tyro.conf.arg(help=HELP["beta2"])] = 0.999
    epsilon: Annotated[float, tyro.conf.arg(help=HELP["epsilon"])] = 1e-8
    weight_decay: Annotated[float, tyro.conf.arg(help=HELP["weight_decay"])] = 0.01
    momentum: Annotated[float, tyro.conf.arg(help=HELP["momentum"])] = 0.0
    schedule: ScheduleName = "cosine"
    """Learning-rate decay after warmup."""
    warmup_steps: int = 0
    """Steps of linear learning-rate warmup from 0."""
    final_fraction: float = 0.1
    """Final learning rate as a fraction of the peak, for schedules that decay."""

    def __post_init__(self) -> None:
        for field_name, table in (("name", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, field_name)
            require(value in table, f"--optim.{field_name} is {value}; use one of {', '.join(table)}.")
        require_ranges(
            self,
            "optim.",
            learning_rate=NOT_NEGATIVE.such_as("1e-4"),
            beta1=BELOW_1.such_as("0.9"),
            beta2=BELOW_1.such_as("0.999"),
            epsilon=ABOVE_0.such_as("1e-8"),
            weight_decay=NOT_NEGATIVE.such_as("0.01"),
            momentum=BELOW_1.such_as("0.9"),
            warmup_steps=at_least(0).such_as("100"),
            final_fraction=UP_TO_1,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Run directory, length, seed and validation."""

    dir: Path
    """Run directory for metrics, checkpoints and the export. The same command resumes from its newest checkpoint."""
    max_steps: int | None = None
    """Optimizer steps. Set this or --run.epochs."""
    epochs: float | None = None
    """Epochs over the training data. Set this or --run.max-steps."""
    seed: int = 0
    """Random seed for sample order, weight initialization and dropout."""
    validate_every: int = 0
    """Steps between validations; 0 validates at step 0 and at the end only."""
    patience: int = 0
    """Early stopping: stop after this many validations without improvement; 0 disables it."""
    export: Literal["best", "last", "none"] = "best"
    """Checkpoint to export to RUN/export: the best by validation, the last, or none."""
    max_minutes: float | None = None
    """After this many minutes, finish the current step, save, and exit with code 75 (requeue)."""
    timeout_minutes: float = 10.0
    """Timeout of collectives; a rank that waits longer exits with code 75. Must exceed every validation and save."""
    deterministic: bool = False
    """Bitwise reproducible results on GPUs of one model, at some cost in speed. CPU runs always are."""
    fresh: bool = False
    """Start over: delete the checkpoints and metrics of an earlier run in --run.dir."""

    def __post_init__(self) -> None:
        require(
            (self.max_steps is None) != (self.epochs is None),
            f"--run.max-steps is {self.max_steps} and --run.epochs is {self.epochs}; set exactly one of them.",
        )
        require(is_unicode(str(self.dir)), f"--run.dir is {self.dir!s}, which is not UTF-8; choose another folder.")
        require_ranges(
            self,
            "run.",
            max_steps=at_least(1).such_as("1000"),
            epochs=ABOVE_0.such_as("1"),
            seed=SEED,
            validate_every=at_least(0),
            patience=at_least(0),
            max_minutes=ABOVE_0.such_as("230"),
            timeout_minutes=ABOVE_0.such_as("10"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoint frequency and retention. The best checkpoint by validation is always kept."""

    every: int = 0
    """Steps between checkpoints; 0 saves only at the end and when validation improves."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 keeps only the newest and the best."""
    in_background: Annotated[bool, tyro.conf.arg(name="async")] = False
    """Asynchronous saving: copy the state to host memory and write it while training continues."""
    allow_changed: tuple[str, ...] = ()
    """Differences from the checkpoint to accept when resuming, such as data; the error message names each."""

    def __post_init__(self) -> None:
        ranges = {"every": at_least(0), "keep_last": at_least(1).such_as("2"), "keep_every": at_least(0)}
        require_ranges(self, "checkpoint.", **ranges)
        require(
            set(self.allow_changed) <= CHANGEABLE,
            f"--checkpoint.allow-changed is {' '.join(self.allow_changed)}; "
            f"allowed are {' '.join(sorted(CHANGEABLE))}.",
        )


MIN_SPIKE_STEPS = 32
"""Minimum number of steps from which the guard can tell a spike from noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Handling of bad steps: non-finite values, loss spikes, repeated overflows. RUN/events.jsonl records each.

    stop ends the run with exit code 5; skip discards the step's update; rewind returns to the last checkpoint and then
    skips the step's samples.
    """

    non_finite: NonFinitePolicy = "stop"
    """Action on a NaN or infinite loss or gradient norm."""
    spike: SpikePolicy = "ignore"
    """Action on a loss or gradient norm far above the recent ones."""
    spike_deviations: float = 8.0
    """Spike threshold: robust standard deviations (1.4826 times the MAD) above the median of the window."""
    spike_window: int = 128
    """Recent steps that the median is taken over. Detection starts once a quarter of them, at least 32, have run."""
    max_overflows: int = 20
    """Stop after this many consecutive fp16 overflows."""
    max_skips: int = 10
    """Stop after this many consecutive skipped steps."""
    max_rewinds: int = 10
    """Maximum number of rewinds; instead of one more, the run stops with exit code 5."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            "guard.",
            spike_deviations=ABOVE_0.such_as("8"),
            spike_window=at_least(MIN_SPIKE_STEPS).such_as("128"),
            max_overflows=at_least(1),
            max_skips=at_least(1),
            max_rewinds=at_least(1),
        )

    @property
    def goes_back(self) -> bool:
        """True if a bad step may rewind the run, which needs a checkpoint before the first step."""
        return any(POLICIES[name].then == "go back" for name in (self.non_finite, self.spike))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Validation during training (not evaluate_zero_shot): sliding windows score every token of a document once."""

    context_length: int | None = None
    """Input tokens per window. By default --data.context-length."""
    stride: int | None = None
    """Tokens by which the window advances; fewer are slower and lower perplexity. By default half the context."""
    batch_size: int = 8
    """Windows per rank in a forward pass."""

    def __post_init__(self) -> None:
        require_ranges(self, "eval.", context_length=at_least(1), stride=at_least(1), batch_size=at_least(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Experiment trackers, in addition to RUN/metrics.jsonl, which is always written."""

    wandb: bool = False
    """Log to Weights & Biases (without a network, set WANDB_MODE=offline)."""
    wandb_project: str = "megaft"
    """Weights & Biases project name."""
    tensorboard: bool = False
    """Write TensorBoard event files to RUN/tensorboard."""
    peak_flops: float | None = None
    """Dense peak FLOP/s of one device, for MFU. By default from the data sheet of common GPUs, else measured."""

    def __post_init__(self) -> None:
        require_ranges(self, "metrics.", peak_flops=ABOVE_0.such_as("989e12"))
        require(
            self.wandb or self.wandb_project == "megaft",
            f"--metrics.wandb-project is {self.wandb_project}, but --metrics.wandb is off. Add --metrics.wandb.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Finetune a causal language model with DeepSpeed.

    The same command resumes an interrupted run from its newest checkpoint.
    """

    deepspeed_config: Path
    """DeepSpeed JSON with batch sizes, precision, ZeRO and gradient clipping. See ds_configs/ for recipes."""
    model: ModelConfig
    data: DataConfig
    run: RunConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        has_validation = self.data.valid is not None
        require(
            has_validation or self.run.validate_every == 0,
            f"--run.validate-every is {self.run.validate_every}, but there is no validation data. "
            "Set --data.valid, or remove --run.validate-every.",
        )
        require(
            has_validation or self.eval == EvalConfig(),
            "--eval.* have no effect without --data.valid. Set --data.valid, or remove them.",
        )
        require(
            has_validation or self.run.patience == 0,
            f"--run.patience is {self.run.patience}, without validation data. Set --data.valid or drop --run.patience.",
        )
        require(
            self.model.path is not None or self.data.tokenizer is not None,
            f"--model.from-scratch is {self.model.from_scratch}, which has no tokenizer. Set --data.tokenizer.",
        )
        require(
            self.model.path is not None or self.lora.rank == 0,
            f"--lora.rank is {self.lora.rank}, but LoRA adapts pretrained weights. Set --model.path.",
        )
        size = self.parallel.tensor_parallel_size
        require_shardable(self.model.backend, size, "--parallel.tensor-parallel-size", "--model.backend")
        require(
            self.model.backend == "hugging-face" or self.lora.rank == 0,
            f"--lora.rank is {self.lora.rank}, but LoRA supports transformers' models only. "
            "Set --model.backend hugging-face.",
        )
        stride = self.eval.stride or 1
        require(
            stride <= self.eval_context_length,
            f"--eval.stride is {stride}; use 1 to {self.eval_context_length} (--eval.context-length).",
        )

    @property
    def tokenizer_source(self) -> str:
        """Hub name, folder or file that the tokenizer is loaded from."""
        source = self.data.tokenizer or self.model.path
        assert source is not None, "checked in __post_init__"
        return source

    @property
    def longest_input(self) -> int:
        """Maximum input tokens in a forward pass, of training or validation."""
        return max(self.data.context_length, self.eval_context_length)

    @property
    def eval_context_length(self) -> int:
        """Input tokens per window of validation."""
        return self.eval.context_length or self.data.context_length

    @property
    def eval_stride(self) -> int:
        """Tokens by which the validation window advances."""
        return self.eval.stride or max(1, self.eval_context_length // 2)


def parse_train(arguments: list[str] | None = None, is_main: bool = True) -> TrainConfig:
    """Parse the command line of `megaft/train.py`; on an error the main rank prints it, and all ranks exit with 2."""
    flags = own_flags(arguments)
    with suggesting(TrainConfig, flags, is_shown=is_main):
        return tyro.cli(TrainConfig, args=flags, prog="megaft/train.py", console_outputs=is_main)


def bytes_per_parameter(optim: OptimConfig) -> int:
    """Return the maximum bytes of a checkpoint per trained parameter: fp32 weight and moments."""
    conditions = OPTIMIZERS[optim.name].moments.values()
    num_moments = sum(field is None or getattr(optim, field) > 0 for field in conditions)
    return 4 * (1 + num_moments)
