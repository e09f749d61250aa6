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
from megaft.config.optimizers import NAME_HELP, OPTIMIZERS, OptimizerName
from megaft.config.parallelism import Backend, require_shardable
from megaft.config.policies import POLICIES, NonFinitePolicy, SpikePolicy
from megaft.config.schedules import SCHEDULES, ScheduleName

# What a resumed run can be allowed to change; the other parts of its identity have no override.
CHANGEABLE = frozenset({"data", "tokenizer", "global_batch_size", "validation", "optim", "schedule_steps", "dropout"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The language model to train."""

    path: str | None = None
    """Pretrained model: a hub name, a folder, or a GGUF file."""
    from_scratch: str | None = None
    """Instead of --model.path: a config.json (or its folder) to initialise a new model from."""
    backend: Backend = "hugging-face"
    """Model implementation: transformers, or megatron-core, which supports tensor parallelism."""
    dropout: float | None = None
    """Every dropout probability of the model. By default as its own configuration says."""
    activation_checkpointing: bool = False
    """Keep only each block's input and compute the block again in the backward pass: a third more work, less memory."""
    cross_entropy: Literal["chunked", "liger"] = "chunked"
    """Cross-entropy without full logits: torch in chunks, or Liger's CUDA kernel (the [fast] extra)."""

    def __post_init__(self) -> None:
        require(
            (self.path is None) != (self.from_scratch is None),
            f"--model.path is {self.path} and --model.from-scratch is {self.from_scratch}; give exactly one of them.",
        )
        require_ranges(self, "model.", dropout=BELOW_1.such_as("0.1"))
        require(
            self.backend == "hugging-face" or self.cross_entropy == "chunked",
            f"--model.cross-entropy is {self.cross_entropy}, but --model.backend megatron has its own; drop it.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Tensor parallelism; ZeRO is set in the DeepSpeed JSON."""

    tensor_parallel_size: int = 1
    """Neighbouring ranks that share each matrix and compute on the same samples; the others multiply the batch."""

    def __post_init__(self) -> None:
        require_ranges(self, "parallel.", tensor_parallel_size=at_least(1).such_as("8"))


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
        require_ranges(self, "lora.", rank=at_least(0).such_as("8"), alpha=at_least(1).such_as("16"), dropout=BELOW_1)
        require(
            self.rank > 0 or (self.alpha, self.dropout, self.target_modules) == (16, 0, ()),
            "--lora.rank is 0, so the other lora settings have no effect; give --lora.rank, for example 8.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training and validation data."""

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
        require(len(self.train) > 0, "--data.train is empty; give a text file or a prepared prefix.")
        require_ranges(self, "data.", context_length=at_least(2).such_as("1024"))
        require(
            not (self.attend_within_documents and self.sample == "document"),
            "--data.attend-within-documents has no effect with --data.sample document, whose samples never leave one.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its schedule. Biases and norms are never decayed."""

    name: Annotated[OptimizerName, tyro.conf.arg(help=NAME_HELP)] = "adamw"
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
    schedule: ScheduleName = "cosine"
    """Learning-rate decay after the warm-up, a function of the step alone."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    final_fraction: float = 0.1
    """The learning rate at the last step as a fraction of the peak (linear and cosine)."""

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
    """Length, folder, seed and validation of a run."""

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
    """Checkpoint to export to RUN/export: the best by validation, or the last."""
    max_minutes: float | None = None
    """After this many minutes, finish the current step, save, and exit with code 75 (requeue)."""
    timeout_minutes: float = 10.0
    """Exit with code 75 when another rank has been silent this long. Must exceed the longest validation or save."""
    deterministic: bool = False
    """On CUDA: the same bits every time on GPUs of one model, at some cost in speed. CPUs always give them."""
    fresh: bool = False
    """Start over: checkpoints and metrics of an earlier run in the folder are removed."""

    def __post_init__(self) -> None:
        require(
            (self.max_steps is None) != (self.epochs is None),
            f"--run.max-steps is {self.max_steps} and --run.epochs is {self.epochs}; give exactly one of the two.",
        )
        require(is_unicode(str(self.dir)), f"--run.dir is {self.dir!s}, which is not UTF-8; name another folder.")
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
    """Frequency and retention of checkpoints. The best by validation is always kept."""

    every: int = 0
    """Steps between checkpoints; 0 saves at the end only (and where validation improves)."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Keep also those whose step is a multiple of this; 0 keeps no more."""
    in_background: Annotated[bool, tyro.conf.arg(name="async")] = False
    """Copy the state to host memory and write it while training goes on."""
    allow_changed: tuple[str, ...] = ()
    """Settings in which a resumed run may differ from its checkpoint, named as in the refusal, such as data."""

    def __post_init__(self) -> None:
        ranges = {"every": at_least(0), "keep_last": at_least(1).such_as("2"), "keep_every": at_least(0)}
        require_ranges(self, "checkpoint.", **ranges)
        require(
            set(self.allow_changed) <= CHANGEABLE,
            f"--checkpoint.allow-changed is {' '.join(self.allow_changed)}; "
            f"use some of {' '.join(sorted(CHANGEABLE))}.",
        )


FEWEST_VALUES = 32
"""Steps that the guard needs to tell a spike from noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """Handling of bad steps: non-finite values, loss spikes, repeated overflows. RUN/events.jsonl records each.

    stop ends the run with exit code 5; skip leaves the weights as they were before the step; rewind goes back to the
    last checkpoint and leaves the step's samples out.
    """

    non_finite: NonFinitePolicy = "stop"
    """Action on a loss or gradient norm that is not finite."""
    spike: SpikePolicy = "ignore"
    """Action on a loss or gradient norm far above the recent ones."""
    spike_deviations: float = 8.0
    """Spike threshold: robust standard deviations (1.4826 times the median distance) above the median of the window."""
    spike_window: int = 128
    """Recent steps that a step is compared with; a quarter of them, and at least 32, must be recorded first."""
    max_overflows: int = 20
    """fp16 overflows in a row after which the run stops."""
    max_skips: int = 10
    """Steps skipped in a row after which the run stops."""
    max_rewinds: int = 10
    """Rewinds after which the run stops."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            "guard.",
            spike_deviations=ABOVE_0.such_as("8"),
            spike_window=at_least(FEWEST_VALUES).such_as("128"),
            max_overflows=at_least(1),
            max_skips=at_least(1),
            max_rewinds=at_least(1),
        )

    @property
    def goes_back(self) -> bool:
        """True if a bad step may lead back to a checkpoint, of which there must then be one from the beginning."""
        return any(POLICIES[name].then == "go back" for name in (self.non_finite, self.spike))


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
        require_ranges(self, "eval.", context_length=at_least(1), stride=at_least(1), batch_size=at_least(1))


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    """Experiment trackers, besides RUN/metrics.jsonl, which is always written."""

    wandb: bool = False
    """Log to Weights & Biases (set WANDB_MODE=offline where there is no network)."""
    wandb_project: str = "megaft"
    """The Weights & Biases project."""
    tensorboard: bool = False
    """Write TensorBoard event files to RUN/tensorboard."""
    peak_flops: float | None = None
    """The device's dense peak in FLOP/s, for MFU. By default known for common GPUs, measured elsewhere."""

    def __post_init__(self) -> None:
        require_ranges(self, "metrics.", peak_flops=ABOVE_0.such_as("989e12"))
        require(
            self.wandb or self.wandb_project == "megaft",
            f"--metrics.wandb-project is {self.wandb_project}, but --metrics.wandb is off; switch it on.",
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
            f"--run.validate-every is {self.run.validate_every} but --data.valid is not given; give both or neither.",
        )
        require(
            has_validation or self.eval == EvalConfig(),
            "eval settings have no effect without a text to validate on; give --data.valid, or drop them.",
        )
        require(
            has_validation or self.run.patience == 0,
            f"--run.patience is {self.run.patience} but --data.valid is not given; patience counts validations.",
        )
        require(
            self.model.path is not None or self.data.tokenizer is not None,
            "--model.from-scratch brings no tokenizer; give --data.tokenizer.",
        )
        require(
            self.model.path is not None or self.lora.rank == 0,
            f"--lora.rank is {self.lora.rank}, but a model from scratch has nothing to adapt; give --model.path.",
        )
        size = self.parallel.tensor_parallel_size
        require_shardable(self.model.backend, size, "--parallel.tensor-parallel-size", "--model.backend")
        require(
            self.model.backend == "hugging-face" or self.lora.rank == 0,
            f"--lora.rank is {self.lora.rank}, but adapters need transformers' modules; "
            "give --model.backend hugging-face.",
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


def parse_train(arguments: list[str] | None = None, is_main: bool = True) -> TrainConfig:
    """Parse the command line of `megaft/train.py`; on an error the main rank prints the rule and all exit with 2."""
    flags = own_flags(arguments)
    with suggesting(TrainConfig, flags, is_shown=is_main):
        return tyro.cli(TrainConfig, args=flags, prog="megaft/train.py", console_outputs=is_main)


def bytes_per_parameter(optim: OptimConfig) -> int:
    """Return the largest bytes of a trained parameter in a checkpoint: the weight and each moment in fp32."""
    conditions = OPTIMIZERS[optim.name].moments.values()
    num_moments = sum(field is None or getattr(optim, field) > 0 for field in conditions)
    return 4 * (1 + num_moments)
