"""Optimizers by name, their parameter groups, and the learning rate as a function of the step alone."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from megaft.base.checks import require
from megaft.base.errors import ConfigError
from megaft.base.plural import counted
from megaft.config.train import OptimConfig

FUSED_ADAMW_DEVICES = ("cuda", "cpu")  # on a CPU three times as fast as the unfused one, and equal to 2.4e-7


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, *, device_type: str) -> torch.optim.Optimizer:
    """The optimizer called `config.name`.

    Args:
        groups: As `parameter_groups` gives them; each says its own weight decay.
        config: SGD adds weight decay to the gradient (as torch does); the others decay the weights themselves.
        device_type: Where it updates: "cpu" also on a CUDA machine when ZeRO offloads the optimizer.

    Raises:
        ConfigError: NVIDIA's apex is asked for and not there.
    """
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    if config.name == "adamw":
        fused = device_type in FUSED_ADAMW_DEVICES
        return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config.epsilon, fused=fused)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum)
    if config.name == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    return _apex_fused_adam()(groups, lr=rate, betas=betas, eps=config.epsilon, adam_w_mode=True)


def _apex_fused_adam() -> Any:
    """NVIDIA's class; PyPI's `apex` is a toolkit for the Pyramid web framework."""
    fix = "Build it with --cuda_ext from github.com/NVIDIA/apex, or use --optim.name adamw."
    require(
        importlib.util.find_spec("apex") is not None, f"--optim.name is apex-adamw, but apex is not installed. {fix}"
    )
    if importlib.util.find_spec("amp_C") is None:  # the CUDA kernels that apex.optimizers loads
        raise ConfigError(
            "--optim.name is apex-adamw, but the apex installed here is not NVIDIA's with CUDA kernels (no amp_C); "
            f"`pip install apex` gives another project. {fix}"
        )
    return importlib.import_module("apex.optimizers").FusedAdam


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """The learning rate of a step, counted from 0.

    Warm-up: peak * (step + 1) / warmup_steps, so that the first step moves the weights and step warmup_steps - 1 has
    the peak. Then from the peak at step warmup_steps to final_fraction * peak at step max_steps - 1, along a line or
    half a cosine (Loshchilov and Hutter 2017, equation 5). Where that is one and the same step it has the peak.

    Raises:
        ConfigError: The warm-up is longer than the run.
    """
    warmup_steps = config.warmup_steps
    require(
        warmup_steps <= max_steps,
        f"--optim.warmup-steps is {warmup_steps}, but the run has {counted(max_steps, 'step')}; use at most that, "
        f"for example {max_steps // 10}.",
    )
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    remaining = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2.0}
    floor = 1.0 if config.schedule == "constant" else config.final_fraction
    return config.learning_rate * (floor + (1.0 - floor) * remaining[config.schedule])


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value
