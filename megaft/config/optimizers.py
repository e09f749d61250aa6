"""Table of optimizers: one entry per optimizer, with all properties that differ; --help is generated from it.

To add one, add an entry, and a field to `OptimConfig` for a setting that no other optimizer has. docs/architecture.md
says which optimizers fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megaft.config.deepspeed_keys import BlockTranslation

Setting = str | tuple[str, ...]
"""A field of OptimConfig, or several that the optimizer takes as one argument."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """Optimizer: class, arguments, states and supported devices."""

    class_name: str
    """Dotted name of the class, imported only when the optimizer is built."""
    arguments: Mapping[str, Setting]
    """By argument of the class: field of OptimConfig. All classes also take learning rate and weight decay."""
    constants: Mapping[str, bool] = field(default_factory=dict)
    """Arguments of the class with fixed values."""
    fused_on: tuple[str, ...] = ()
    """Device types on which `fused=True` is passed; empty if the class has no such argument."""
    moments: Mapping[str, str | None]
    """Optimizer states in a checkpoint, at most one fp32 number per parameter, each with the OptimConfig field that
    must be above 0 for the state to exist (None: it always exists)."""
    block: BlockTranslation | None = None
    """Translation of DeepSpeed JSON blocks to this optimizer; None if there is none."""
    decouples_weight_decay: bool = True
    """False if weight decay is added to the gradient (L2) and so enters the states."""
    needs_whole_matrices: bool = False
    """True if the update depends on the whole matrix; ZeRO flattens matrices, megatron-core fuses or shards them."""
    cpu_equivalent: str | None = None
    """For a CUDA-only optimizer: name of the optimizer with the same states that runs on a CPU."""
    required_modules: Mapping[str, str] = field(default_factory=dict)
    """Required Python modules besides torch, each with the message if it is not installed."""
    install: str = ""
    """Installation instructions for these modules."""

    @property
    def settings(self) -> frozenset[str]:
        """Fields of OptimConfig that this optimizer uses, and that some others do not."""
        fields = (names if isinstance(names, tuple) else (names,) for names in self.arguments.values())
        return frozenset(name for names in fields for name in names)


_ADAM = {"betas": ("beta1", "beta2"), "eps": "epsilon"}
_ADAM_MOMENTS = {"exp_avg": None, "exp_avg_sq": None}

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        class_name="torch.optim.AdamW",
        arguments=_ADAM,
        fused_on=("cuda", "cpu"),  # on CPUs three times as fast as unfused, and equal to 2.4e-7
        moments=_ADAM_MOMENTS,
        block=BlockTranslation(
            types=("Adam", "AdamW", "FusedAdam"),
            takes={
                "lr": ("learning_rate", 1e-3),
                "beta1": ("beta1", 0.9),
                "beta2": ("beta2", 0.999),
                "eps": ("epsilon", 1e-8),
                "weight_decay": ("weight_decay", 0.0),
            },
            only={
                "adam_w_mode": (True, True),
                "bias_correction": (True, True),
                "amsgrad": (False, False),
                "torch_adam": (True, True),
            },
        ),
    ),
    "sgd": Optimizer(
        class_name="torch.optim.SGD",
        arguments={"momentum": "momentum"},
        decouples_weight_decay=False,
        moments={"momentum_buffer": "momentum"},
        block=BlockTranslation(
            types=("SGD",),
            takes={
                "lr": ("learning_rate", 1e-3),
                "momentum": ("momentum", 0.0),
                "weight_decay": ("weight_decay", 0.0),
            },
            only={"dampening": (0, 0), "nesterov": (False, False)},
        ),
    ),
    "adafactor": Optimizer(
        class_name="torch.optim.Adafactor",
        arguments={},
        moments={"variance": None},  # for matrices row_var and col_var: one number per row and per column
        needs_whole_matrices=True,
    ),
    "apex-adamw": Optimizer(
        class_name="apex.optimizers.FusedAdam",
        arguments=_ADAM,
        constants={"adam_w_mode": True},
        moments=_ADAM_MOMENTS,
        cpu_equivalent="adamw",
        required_modules={
            "apex": "apex is not installed",
            # amp_C holds the CUDA kernels that apex.optimizers loads; PyPI's apex is a toolkit for web applications.
            "amp_C": "the apex installed here is not NVIDIA's with CUDA kernels (no amp_C); `pip install apex` "
            "installs another project",
        },
        install="Build it with --cuda_ext from github.com/NVIDIA/apex",
    ),
}


def help_texts() -> dict[str, str]:
    """Return the help texts of OptimConfig's fields that depend on the table."""
    coupled = [name for name, optimizer in OPTIMIZERS.items() if not optimizer.decouples_weight_decay]
    exception = f", except with {' and '.join(coupled)}" if coupled else ""
    return {
        "name": f"Optimizer: {'; '.join(_summary(name, optimizer) for name, optimizer in OPTIMIZERS.items())}.",
        "beta1": f"Decay rate of the first moment{_for_optimizers('beta1')}.",
        "beta2": f"Decay rate of the second moment{_for_optimizers('beta2')}.",
        "epsilon": f"Added to the square root of the second moment{_for_optimizers('epsilon')}.",
        "weight_decay": f"Weight decay of matrices and embeddings; decoupled{exception}.",
        "momentum": f"Momentum{_for_optimizers('momentum')}.",
    }


def _summary(name: str, optimizer: Optimizer) -> str:
    limits = [
        *([" in fp32 with ZeRO 0"] if optimizer.needs_whole_matrices else []),
        *([" on CUDA devices"] if optimizer.cpu_equivalent else []),
    ]
    return f"{name} is {optimizer.class_name}{','.join(limits)}"


def _for_optimizers(setting: str) -> str:
    names = [name for name, optimizer in OPTIMIZERS.items() if setting in optimizer.settings]
    return f", for {', '.join(names)}"


HELP = help_texts()

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[*OPTIMIZERS]
