"""The optimizer and scheduler blocks of a DeepSpeed JSON, read as megaft's own settings.

megaft hands the engine its own optimizer and sets the learning rate itself, so a block is translated or refused; a
parameter that the block leaves out has DeepSpeed's default, unless the command line gives it. The warm-up is megaft's
(`optim.learning_rate`), one step ahead of DeepSpeed's, whose first step has learning rate 0 and moves nothing.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from megaft.base.checks import require
from megaft.config.deepspeed_keys import Dtype, fail, refuse_unknown_keys
from megaft.config.train import OptimConfig


class Block(NamedTuple):
    """Translation of one type of optimizer or scheduler block; a parameter whose default is `...` is required."""

    sets: dict[str, Any]
    """OptimConfig fields that the type alone decides."""
    takes: dict[str, tuple[str, Any]]
    """Parameter: the OptimConfig field it is, and DeepSpeed's default (None: the field keeps its value)."""
    only: dict[str, tuple[Any, Any]]
    """Parameter: the only value megaft offers, and DeepSpeed's default."""


_ADAM = Block(
    {"name": "adamw"},
    {
        "lr": ("learning_rate", 1e-3),
        "beta1": ("beta1", 0.9),
        "beta2": ("beta2", 0.999),
        "eps": ("epsilon", 1e-8),
        "weight_decay": ("weight_decay", 0.0),
    },
    {
        "adam_w_mode": (True, True),
        "bias_correction": (True, True),
        "amsgrad": (False, False),
        "torch_adam": (True, True),
    },
)
_SGD = Block(
    {"name": "sgd"},
    {"lr": ("learning_rate", 1e-3), "momentum": ("momentum", 0.0), "weight_decay": ("weight_decay", 0.0)},
    {"dampening": (0, 0), "nesterov": (False, False)},
)
TOTAL_STEPS = "total_num_steps"  # not a field of OptimConfig: the run's length, which is run.max-steps
_WARMUP = {"warmup_num_steps": ("warmup_steps", 1000)}
_LINEAR = {"warmup_type": ("linear", "log")}
BLOCKS = {
    "optimizer": {"Adam": _ADAM, "AdamW": _ADAM, "FusedAdam": _ADAM, "SGD": _SGD},
    "scheduler": {
        "WarmupLR": Block(
            {"schedule": "constant"},
            {**_WARMUP, "warmup_max_lr": ("learning_rate", None)},
            {**_LINEAR, "warmup_min_lr": (0, 0)},
        ),
        "WarmupDecayLR": Block(
            {"schedule": "linear", "final_fraction": 0.0},
            {**_WARMUP, "warmup_max_lr": ("learning_rate", ...), TOTAL_STEPS: (TOTAL_STEPS, ...)},
            {**_LINEAR, "warmup_min_lr": (0, 0)},
        ),
        "WarmupCosineLR": Block(
            {"schedule": "cosine"},
            {**_WARMUP, "cos_min_ratio": ("final_fraction", 1e-4), TOTAL_STEPS: (TOTAL_STEPS, ...)},
            {**_LINEAR, "warmup_min_ratio": (0, 0)},
        ),
    },
}
WHOLE_NUMBERS = ("warmup_steps", TOTAL_STEPS)

UNUSED_SETTINGS = {  # fields of OptimConfig that would have no effect
    "adamw": ("momentum",),
    "apex-adamw": ("momentum",),
    "sgd": ("beta1", "beta2", "epsilon"),
    "adafactor": ("beta1", "beta2", "epsilon", "momentum"),
    "constant": ("final_fraction",),
    "linear": (),
    "cosine": (),
}


def translate_blocks(config: dict[str, Any], optim: OptimConfig, notes: list[str]) -> tuple[OptimConfig, int | None]:
    """Take the optimizer and scheduler blocks out of `config` and into settings.

    Returns:
        The settings, and the number of steps that a scheduler block says the run has.

    Raises:
        ConfigError: A type or parameter that megaft does not offer, or one value said twice and differently.
    """
    defaults, said, implied = OptimConfig(), {}, {}
    for kind in (kind for kind in BLOCKS if kind in config):
        for field, (value, path, is_given) in _read_block(kind, config.pop(kind)).items():
            _keep_one(field, value, path, said) if is_given else implied.setdefault(field, value)
    total_num_steps = said.pop(TOTAL_STEPS, (None,))[0]
    for field, (value, path) in said.items():
        set_value = getattr(optim, field)
        flag = f"--optim.{field.replace('_', '-')}"
        if set_value not in (getattr(defaults, field), value):
            fail(path, value, f"but {flag} is {set_value}. Say it once, or the same twice.")
    values = {field: value for field, (value, _) in said.items()}
    values |= {f: v for f, v in implied.items() if f not in values and getattr(optim, f) == getattr(defaults, f)}
    if values:
        listed = ", ".join(f"{field.replace('_', '-')} {value}" for field, value in values.items())
        notes.append(f"From the DeepSpeed JSON's optimizer and scheduler, run by megaft: {listed}.")
    return replace(optim, **values), total_num_steps


def _keep_one(field: str, value: Any, path: str, said: dict[str, tuple[Any, str]]) -> None:
    other, other_path = said.setdefault(field, (value, path))
    if other != value:
        fail(path, value, f"but {other_path} is {json.dumps(other)}. Say it once, or the same twice.")


def _read_block(kind: str, block: dict[str, Any]) -> dict[str, tuple[Any, str, bool]]:
    """OptimConfig's field -> (value, path in the JSON, whether the JSON gives it or DeepSpeed's default stands)."""
    types = {name.lower(): (name, meaning) for name, meaning in BLOCKS[kind].items()}
    name = block.get("type")
    if not isinstance(name, str) or name.lower() not in types:
        fail(f"{kind}.type", name, f"use one of {', '.join(BLOCKS[kind])}, or leave the block out and use optim.*.")
    meaning = types[name.lower()][1]
    params = _spread_betas(block.get("params", {}), f"{kind}.params")
    refuse_unknown_keys(params, (*meaning.takes, *meaning.only), f"{kind}.params.")
    for key, (allowed, default) in meaning.only.items():
        value = params.get(key, default)
        if value != allowed:
            source = "" if key in params else ", DeepSpeed's default,"
            fail(f"{kind}.params.{key}", value, f"that{source} is not offered: give {json.dumps(allowed)}.")
    found = {field: (value, f"{kind}.type", True) for field, value in meaning.sets.items()}
    for key, (field, default) in meaning.takes.items():
        path, value = f"{kind}.params.{key}", params.get(key, default)
        require(value is not ..., f"DeepSpeed JSON: {path} is not given, and {name} needs it.")
        if key in params and not (type(value) is int or (type(value) is float and field not in WHOLE_NUMBERS)):
            fail(path, value, f"it is a {'whole ' if field in WHOLE_NUMBERS else ''}number, without quotes.")
        if value is not None:
            found[field] = (value, path, key in params)
    return found


def _spread_betas(params: Any, path: str) -> dict[str, Any]:
    """The params with `betas` as beta1 and beta2."""
    if not isinstance(params, dict):
        fail(path, params, "it is an object, such as {}.")
    betas = params.get("betas", [None, None])
    if not isinstance(betas, list) or len(betas) != 2:
        fail(f"{path}.betas", betas, "it is a list of two numbers, such as [0.9, 0.999].")
    rest = {key: value for key, value in params.items() if key != "betas"}
    return rest | ({"beta1": betas[0], "beta2": betas[1]} if "betas" in params else {})


def check_optimizer(optim: OptimConfig, stage: int, dtype: Dtype, on_cuda: bool) -> None:
    """Refuse an optimizer that would not be itself, and settings without effect."""
    require(
        optim.name != "adafactor" or (stage == 0 and dtype == "float32"),
        f"--optim.name is adafactor with zero_optimization.stage {stage} in {dtype}. Adafactor looks at whole matrices "
        "and ZeRO flattens them, so it is another optimizer there. Use ds_configs/zero0_fp32.json, or adamw.",
    )
    require(
        optim.name != "apex-adamw" or on_cuda,
        "--optim.name is apex-adamw, which updates on a CUDA device only: use adamw without CUDA or with offload.",
    )
    defaults = OptimConfig()
    for field in (*UNUSED_SETTINGS[optim.name], *UNUSED_SETTINGS[optim.schedule]):
        value, user = getattr(optim, field), optim.schedule if field == "final_fraction" else optim.name
        require(
            value == getattr(defaults, field),
            f"--optim.{field.replace('_', '-')} is {value}, which has no effect on {user}: leave it out.",
        )
