"""Read, check, translate and complete the DeepSpeed JSON.

DeepSpeed accepts unknown top-level keys silently and divides batch sizes without looking at the remainder, so user
errors are caught here, before a GPU is allocated. Imports neither torch nor deepspeed.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megaft.base.checks import require
from megaft.base.errors import ConfigError
from megaft.base.files import parse_json
from megaft.base.nested import leaves
from megaft.base.plural import counted
from megaft.config.deepspeed_blocks import check_optimizer, translate_blocks
from megaft.config.deepspeed_keys import (
    ACCUMULATION,
    BATCH_KEYS,
    BLOCK_KEYS,
    FILLED_IN,
    FILLED_IN_BF16,
    GLOBAL_BATCH,
    HOLDS_STRINGS,
    KNOWN_KEYS,
    MICRO_BATCH,
    ONLY,
    REFUSED,
    Dtype,
    fail,
    refuse_unknown_keys,
)
from megaft.config.train import OptimConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedSettings:
    """Settings of the DeepSpeed JSON, resolved for a number of ranks."""

    as_read: dict[str, Any]
    """The JSON as returned by `read_deepspeed_json`."""
    engine_config: dict[str, Any]
    """Configuration for deepspeed.initialize: all three batch sizes, no "auto", no optimizer and no scheduler."""
    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    dtype: Dtype
    zero_stage: int
    offload_optimizer: bool
    gradient_clipping: float
    """Maximum gradient norm; 0 disables clipping."""
    optim: OptimConfig
    """Optimizer settings, with those of the JSON's optimizer and scheduler blocks."""
    total_num_steps: int | None
    """Total steps of the scheduler block, which must equal the run's; the caller checks that."""
    notes: tuple[str, ...]
    """Sentences to print once: settings translated from the JSON, and defaults that change the training."""


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a DeepSpeed configuration file.

    Raises:
        ConfigError: No such file, not UTF-8, broken JSON (line and column), a key given twice, NaN, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = parse_json(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; give a DeepSpeed JSON, such as ds_configs/zero2_bf16.json."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        message = (
            f"{path}, line {error.lineno}, column {error.colno}: {error.msg}; JSON has no comments or trailing commas."
        )
        raise ConfigError(message) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    require(isinstance(raw, dict), f"{path} holds a {type(raw).__name__}; a DeepSpeed JSON is one object: {{...}}.")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, f"{', '.join(twice)}: given twice in one object, of which JSON keeps only the last. Remove one.")
    return dict(pairs)


def _refuse_constant(constant: str) -> NoReturn:
    raise ConfigError(f"{constant} is not JSON; write a finite number.")


def resolve(
    raw: dict[str, Any],
    *,
    world_size: int,
    optim: OptimConfig,
    has_cuda: bool,
    resumed_batch_size: int | None = None,
) -> ResolvedSettings:
    """Check a DeepSpeed JSON and resolve it for a number of ranks.

    Args:
        raw: The JSON as returned by `read_deepspeed_json`; it is not modified.
        world_size: Data-parallel ranks.
        optim: Optimizer settings of the command line. The JSON's blocks override defaults only.
        has_cuda: True if the ranks have CUDA devices.
        resumed_batch_size: Global batch size of a resumed run, perhaps on another number of ranks. The micro-batch
            size is lowered to the largest that splits it evenly.

    Raises:
        ConfigError: A key or value that DeepSpeed would reject, ignore or interpret differently.
    """
    config, notes = copy.deepcopy(raw), []
    _drop_disabled(config)
    _refuse_unknown(config)
    _refuse_wrong_types(config)
    _refuse_other_values(config)
    stage, dtype = _zero_stage(config), _dtype(config)
    offloads = _offloads_optimizer(config, stage)
    _check_precision(stage, dtype)
    optim, total_num_steps = translate_blocks(config, optim, notes)
    check_optimizer(optim, stage, dtype, has_cuda and not offloads)
    if resumed_batch_size is not None:
        _lower_micro_batch_to_divisor(config, resumed_batch_size, world_size, notes)
    batch = _batch_sizes(config, world_size, notes)
    _fill_in(config, batch, notes)
    return ResolvedSettings(
        as_read=raw,
        engine_config=config,
        global_batch_size=batch[0],
        micro_batch_size=batch[1],
        gradient_accumulation_steps=batch[2],
        dtype=dtype,
        zero_stage=stage,
        offload_optimizer=offloads,
        gradient_clipping=_gradient_clipping(config),
        optim=optim,
        total_num_steps=total_num_steps,
        notes=tuple(notes),
    )


def _get(config: dict[str, Any], path: str) -> Any:
    """Return the value at a path such as "zero_optimization.stage"; None if absent."""
    for key in path.split("."):
        config = config.get(key) if isinstance(config, dict) else None  # type: ignore[assignment]
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_disabled(value: Any) -> bool:
    return value is False or (isinstance(value, dict) and value.get("enabled") is False)


def _drop_disabled(config: dict[str, Any]) -> None:
    """Delete unsupported blocks that are disabled; DeepSpeed rejects some of them even then."""
    for key in [key for key in REFUSED if _is_disabled(config.get(key))]:
        del config[key]


def _refuse_unknown(config: dict[str, Any]) -> None:
    refuse_unknown_keys(config, KNOWN_KEYS, "")
    for key in config:
        require(key not in REFUSED, f"DeepSpeed JSON: remove {key}: {REFUSED.get(key)}.")
    for path, known in BLOCK_KEYS.items():
        block = _get(config, path)
        if block is not None and not isinstance(block, dict):
            fail(path, block, f"use an object with keys among {', '.join(known)}.")
        refuse_unknown_keys(block or {}, known, f"{path}.")


def _refuse_wrong_types(config: dict[str, Any]) -> None:
    for path, value in leaves(config, "."):
        if value == "auto" and path not in BATCH_KEYS:
            fail(path, value, 'only batch sizes can be "auto". Set a value, or remove the key for the default.')
        if value is None:
            fail(path, value, "remove the key for the default.")
        block, _, key = path.rpartition(".")
        if (
            isinstance(value, str)
            and block.startswith(("zero_optimization", "bf16", "fp16"))
            and key not in HOLDS_STRINGS
        ):
            fail(path, value, "use a number, true or false, without quotes.")


def _refuse_other_values(config: dict[str, Any]) -> None:
    for path, (allowed, why) in ONLY.items():
        value = _get(config, path)
        if value is not None and (value != allowed or isinstance(value, bool) != isinstance(allowed, bool)):
            fail(path, value, f"{'remove it' if allowed is None else f'use {json.dumps(allowed)}'}: {why}.")


def _zero_stage(config: dict[str, Any]) -> int:
    stage = config.get("zero_optimization", {}).get("stage", 0)  # DeepSpeed's default
    if type(stage) is not int or not 0 <= stage <= 3:
        fail("zero_optimization.stage", stage, "use 0, 1, 2 or 3 (without quotes).")
    return stage


def _dtype(config: dict[str, Any]) -> Dtype:
    enabled = {key: config.get(key, {}).get("enabled", False) for key in ("bf16", "fp16")}
    for key, value in enabled.items():
        if not isinstance(value, bool):
            fail(f"{key}.enabled", value, "use true or false (without quotes).")
    require(
        not all(enabled.values()), "DeepSpeed JSON: bf16.enabled and fp16.enabled are both true; enable one of them."
    )
    return "bfloat16" if enabled["bf16"] else "float16" if enabled["fp16"] else "float32"


def _check_precision(stage: int, dtype: Dtype) -> None:
    require(
        stage > 0 or dtype == "float32",
        f"DeepSpeed JSON: {dtype} with zero_optimization.stage 0: DeepSpeed's half-precision optimizer there counts a "
        "step without gradients first, which makes Adam's first update wrong (0.74 times as large at beta1 0.9). Use "
        "stage 1, which is equivalent on one GPU.",
    )


def _offloads_optimizer(config: dict[str, Any], stage: int) -> bool:
    for name, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        path = f"zero_optimization.{name}.device"
        device = _get(config, path) or "none"
        if device not in ("none", "cpu"):
            why = "; megaft's checkpoints cannot read state on NVMe" if device == "nvme" else ""
            fail(path, device, f'use "cpu", or "none"{why}.')
        if device == "cpu" and stage < lowest:
            fail(path, device, f"it needs zero_optimization.stage {lowest} or more, but the stage is {stage}.")
    return _get(config, "zero_optimization.offload_optimizer.device") == "cpu"


def _gradient_clipping(config: dict[str, Any]) -> float:
    value = config["gradient_clipping"]
    if not _is_number(value) or value < 0:
        fail("gradient_clipping", value, "use a number above 0, for example 1.0, or 0 to disable clipping.")
    return float(value)


def _batch_sizes(config: dict[str, Any], world_size: int, notes: list[str]) -> tuple[int, int, int]:
    """Return global batch size, micro-batch size and accumulation steps, which must divide without a remainder."""
    train, micro, accumulation = (_positive(config, key) for key in BATCH_KEYS)
    if micro is None and train is None:
        raise ConfigError(
            f"DeepSpeed JSON: no batch size. Set {GLOBAL_BATCH}, for example 64, and {MICRO_BATCH}, for example 4."
        )
    if train is None:
        train = (micro or 1) * (accumulation or 1) * world_size
        notes.append(
            f"{GLOBAL_BATCH} is {train} on {counted(world_size, 'rank')}; set it in the DeepSpeed JSON to train the "
            "same on any number of ranks."
        )
    if micro is None:
        micro = train // ((accumulation or 1) * world_size)
    accumulation = accumulation or train // (max(micro, 1) * world_size)
    if train != micro * accumulation * world_size:
        _fail_batch(config, train, max(micro, 1), max(accumulation, 1), world_size)
    return train, micro, accumulation


def _lower_micro_batch_to_divisor(
    config: dict[str, Any], resumed_batch_size: int, world_size: int, notes: list[str]
) -> None:
    train, micro, accumulation = (_positive(config, key) for key in BATCH_KEYS)
    train = train or resumed_batch_size
    requested = micro or max(1, train // ((accumulation or 1) * world_size))
    size = largest_micro_batch_size(train, requested, world_size)
    config |= zip(BATCH_KEYS, (train, size, "auto"), strict=True)
    if size != requested:
        notes.append(
            f"{MICRO_BATCH} is lowered from {requested} to {size}, so that {GLOBAL_BATCH} {train} splits evenly "
            f"over {counted(world_size, 'rank')}."
        )


def _positive(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key, "auto")
    if value == "auto":
        return None
    if type(value) is not int or value < 1:
        fail(key, value, "use an integer of 1 or more, without quotes.")
    return value


def _fail_batch(config: dict[str, Any], train: int, micro: int, accumulation: int, world_size: int) -> NoReturn:
    given = ", ".join(f"{key} {config[key]}" for key in BATCH_KEYS if config.get(key, "auto") != "auto")
    choices = ", or ".join(
        f"{GLOBAL_BATCH} {size}, {MICRO_BATCH} {size // (count * world_size)}, {ACCUMULATION} {count}"
        for size, count in _legal_batches(train, micro, accumulation, world_size)
    )
    rule = f"{GLOBAL_BATCH} must be {MICRO_BATCH} x {ACCUMULATION} x ranks"
    raise ConfigError(f"DeepSpeed JSON: {given} on {counted(world_size, 'rank')}: {rule}. Use {choices}.")


def _legal_batches(train: int, micro: int, accumulation: int, world_size: int) -> list[tuple[int, int]]:
    """Return up to three valid pairs (global batch size, accumulation steps) near the requested ones."""
    unit, choices = micro * world_size, []
    if train % world_size == 0:
        choices.append((train, train // world_size // largest_micro_batch_size(train, micro, world_size)))
    up = -(-train // unit)
    choices += [(count * unit, count) for count in (accumulation, up, train // unit, up + 1, up + 2) if count > 0]
    return list(dict.fromkeys(choices))[:3]


def largest_micro_batch_size(global_batch_size: int, at_most: int, world_size: int) -> int:
    """Return the largest micro-batch size that splits the global batch evenly over the ranks.

    Raises:
        ConfigError: The global batch size is not a multiple of the number of ranks.
    """
    per_rank, rest = divmod(global_batch_size, world_size)
    require(
        rest == 0,
        f"{GLOBAL_BATCH} is {global_batch_size}, which {counted(world_size, 'data-parallel rank')} cannot split "
        f"evenly. Start a number of ranks that divides it, or, for a new run, use a multiple of {world_size}.",
    )
    return next(size for size in range(min(at_most, per_rank), 0, -1) if per_rank % size == 0)


def _fill_in(config: dict[str, Any], batch: tuple[int, int, int], notes: list[str]) -> None:
    config |= zip(BATCH_KEYS, batch, strict=True)
    defaults = FILLED_IN | (FILLED_IN_BF16 if _get(config, "bf16.enabled") else {})
    missing = {path: value for path, value in defaults.items() if _get(config, path) is None}
    for path, value in missing.items():
        *blocks, key = path.split(".")
        block = config
        for name in blocks:
            block = block.setdefault(name, {})
        block[key] = value
    if "gradient_clipping" in missing:  # the only default that needs a note; RUN/config.json has all
        clipping = missing["gradient_clipping"]
        notes.append(
            f"gradients are clipped to a norm of {clipping:g}, since the DeepSpeed JSON does not set gradient_clipping."
        )
