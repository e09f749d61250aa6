"""Translate the optimizer and scheduler blocks of a DeepSpeed JSON into megaft's own settings.

megaft hands the engine its own optimizer and sets the learning rate itself, so a block is translated or refused. A
parameter that a block does not set has DeepSpeed's default, unless a flag sets it. The warmup is that of
`megaft.run.optim.learning_rate`, shifted by one step against DeepSpeed's, whose first step has learning rate 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megaft.base.checks import require
from megaft.config.deepspeed_keys import BlockTranslation, Dtype, fail, refuse_unknown_keys
from megaft.config.optimizers import OPTIMIZERS, Optimizer
from megaft.config.schedules import SCHEDULES, TOTAL_STEPS, Schedule
from megaft.config.train import OptimConfig

_TABLES: dict[str, tuple[str, Mapping[str, Optimizer | Schedule]]] = {
    "optimizer": ("name", OPTIMIZERS),
    "scheduler": ("schedule", SCHEDULES),
}
"""By kind of block: the OptimConfig field that it sets, and the table of allowed values."""
INTEGERS = ("warmup_steps", TOTAL_STEPS)


def translate_blocks(config: dict[str, Any], optim: OptimConfig, notes: list[str]) -> tuple[OptimConfig, int | None]:
    """Move the optimizer and scheduler blocks from `config` into the optimizer settings.

    Returns:
        The settings, and the total number of steps in the scheduler block (None if not given).

    Raises:
        ConfigError: A type or parameter that megaft does not support, or two different values of one setting.
    """
    defaults, explicit, from_defaults = OptimConfig(), {}, {}
    for kind in (kind for kind in _TABLES if kind in config):
        for field, (value, path, is_set) in _read_block(kind, config.pop(kind)).items():
            if is_set:
                _require_consistent(field, value, path, explicit)
            else:
                from_defaults.setdefault(field, value)
    total_num_steps = explicit.pop(TOTAL_STEPS, (None,))[0]
    for field, (value, path) in explicit.items():
        set_value = getattr(optim, field)
        flag = f"--optim.{field.replace('_', '-')}"
        if set_value not in (getattr(defaults, field), value):
            fail(path, value, f"but {flag} is {set_value}. Set it once, or to the same value in both.")
    values = {field: value for field, (value, _) in explicit.items()}
    values |= {f: v for f, v in from_defaults.items() if f not in values and getattr(optim, f) == getattr(defaults, f)}
    if values:
        listed = ", ".join(f"{field.replace('_', '-')} {value}" for field, value in values.items())
        notes.append(f"From the DeepSpeed JSON's optimizer and scheduler, run by megaft: {listed}.")
    return replace(optim, **values), total_num_steps


def _require_consistent(field: str, value: Any, path: str, explicit: dict[str, tuple[Any, str]]) -> None:
    other, other_path = explicit.setdefault(field, (value, path))
    if other != value:
        fail(path, value, f"but {other_path} is {json.dumps(other)}. Set it once, or to the same value in both.")


def _read_block(kind: str, block: dict[str, Any]) -> dict[str, tuple[Any, str, bool]]:
    """Return, by OptimConfig field: value (DeepSpeed's default if not set), path in the JSON, and True if it is set."""
    known = _types(kind)
    name = block.get("type")
    types = {known_name.lower(): entry for known_name, entry in known.items()}
    if not isinstance(name, str) or name.lower() not in types:
        fail(f"{kind}.type", name, f"use one of {', '.join(known)}, or remove the block and use --optim.*.")
    chosen, translation = types[name.lower()]
    params = _spread_betas(block.get("params", {}), f"{kind}.params")
    refuse_unknown_keys(params, (*translation.takes, *translation.only), f"{kind}.params.")
    for key, (allowed, default) in translation.only.items():
        value = params.get(key, default)
        if value != allowed:
            source = "" if key in params else ", DeepSpeed's default,"
            fail(f"{kind}.params.{key}", value, f"that{source} is not supported. Use {json.dumps(allowed)}.")
    decided = {_TABLES[kind][0]: chosen, **translation.sets}
    settings = {field: (value, f"{kind}.type", True) for field, value in decided.items()}
    for key, (field, default) in translation.takes.items():
        path, value = f"{kind}.params.{key}", params.get(key, default)
        require(value is not ..., f"DeepSpeed JSON: {path} is missing. {name} requires it.")
        if key in params and not (type(value) is int or (type(value) is float and field not in INTEGERS)):
            fail(path, value, f"use {'an integer' if field in INTEGERS else 'a number'} without quotes.")
        if value is not None:
            settings[field] = (value, path, key in params)
    return settings


def _types(kind: str) -> dict[str, tuple[str, BlockTranslation]]:
    """Return, by DeepSpeed type: the name in megaft's table, and the translation."""
    entries = _TABLES[kind][1].items()
    return {type_: (name, entry.block) for name, entry in entries if entry.block for type_ in entry.block.types}


def _spread_betas(params: Any, path: str) -> dict[str, Any]:
    """Return the params with `betas` replaced by beta1 and beta2."""
    if not isinstance(params, dict):
        fail(path, params, "use an object, such as {}.")
    betas = params.get("betas", [None, None])
    if not isinstance(betas, list) or len(betas) != 2:
        fail(f"{path}.betas", betas, "use a list of two numbers, such as [0.9, 0.999].")
    rest = {key: value for key, value in params.items() if key != "betas"}
    return rest | ({"beta1": betas[0], "beta2": betas[1]} if "betas" in params else {})


def check_optimizer(optim: OptimConfig, stage: int, dtype: Dtype, on_cuda: bool) -> None:
    """Refuse an optimizer that ZeRO or the device does not support, and settings without effect."""
    optimizer = OPTIMIZERS[optim.name]
    require(
        not optimizer.needs_whole_matrices or (stage == 0 and dtype == "float32"),
        f"--optim.name is {optim.name} with zero_optimization.stage {stage} in {dtype}. It needs whole matrices, "
        "but ZeRO flattens them. Use ds_configs/zero0_fp32.json, or --optim.name adamw.",
    )
    require(
        optimizer.cpu_equivalent is None or on_cuda,
        f"--optim.name is {optim.name}, which runs only on CUDA devices. Without CUDA, or with optimizer offload, use "
        f"--optim.name {optimizer.cpu_equivalent}.",
    )
    defaults = OptimConfig()
    for name, table in ((optim.name, OPTIMIZERS), (optim.schedule, SCHEDULES)):
        for field in _unused_settings(name, table):
            value = getattr(optim, field)
            require(
                value == getattr(defaults, field),
                f"--optim.{field.replace('_', '-')} is {value}, which has no effect on {name}. Remove it.",
            )


def _unused_settings(name: str, table: Mapping[str, Optimizer | Schedule]) -> list[str]:
    """Return the fields of OptimConfig that only other entries of the table use."""
    fields = dict.fromkeys(field for entry in table.values() for field in sorted(entry.settings))
    return [field for field in fields if field not in table[name].settings]
