"""Optimizer construction, and the learning rate as a function of the step alone."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from megaft.base.checks import require
from megaft.config.optimizers import OPTIMIZERS
from megaft.config.schedules import SCHEDULES
from megaft.config.train import OptimConfig


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, *, device_type: str) -> torch.optim.Optimizer:
    """Return the optimizer named `config.name`.

    Args:
        groups: From `parameter_groups`, each with its own weight decay.
        config: The optimizer's settings.
        device_type: Device type of the update: "cpu" also on a CUDA machine when ZeRO offloads the optimizer.

    Raises:
        ConfigError: A module that the optimizer needs is not installed.
    """
    optimizer = OPTIMIZERS[config.name]
    for module, absence in optimizer.required_modules.items():
        fix = f"{optimizer.install}, or use --optim.name {OptimConfig().name}."
        require(importlib.util.find_spec(module) is not None, f"--optim.name is {config.name}, but {absence}. {fix}")
    arguments = {name: _values(config, fields) for name, fields in optimizer.arguments.items()}
    fused = {"fused": device_type in optimizer.fused_on} if optimizer.fused_on else {}
    module, _, name = optimizer.class_name.rpartition(".")
    build = getattr(importlib.import_module(module), name)
    return build(groups, lr=config.learning_rate, **arguments, **fused, **optimizer.constants)


def _values(config: OptimConfig, fields: str | tuple[str, ...]) -> Any:
    if isinstance(fields, str):
        return getattr(config, fields)
    return tuple(getattr(config, field) for field in fields)


def learning_rate(step: int, config: OptimConfig, max_steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    Warmup: peak * (step + 1) / warmup_steps, so that the first step moves the weights and step warmup_steps - 1 has
    the peak. Then from the peak at step warmup_steps to final_fraction * peak at step max_steps - 1, along the
    schedule's curve. If both are the same step, it has the peak. `plan` refuses a warmup that is longer than the run.
    """
    warmup_steps = config.warmup_steps
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - 1 - warmup_steps))
    schedule = SCHEDULES[config.schedule]
    floor = config.final_fraction if schedule.decays else 1.0
    return config.learning_rate * (floor + (1.0 - floor) * schedule.remaining(progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
