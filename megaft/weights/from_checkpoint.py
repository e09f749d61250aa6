"""Read the fp32 weights of a run's checkpoint under transformers' names, whichever backend and ranks wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megaft.base.checks import require
from megaft.base.errors import DataError
from megaft.base.files import parse_json
from megaft.base.untrusted import require_safe_files
from megaft.weights import canonical
from megaft.weights.checkpoint_reader import WEIGHT
from megaft.weights.parameters import Weights, load_config, require_fitting, shapes_of


def base_model_of_run(folder: Path) -> str:
    """Return the base model of a checkpoint's run, which has the configuration and the tokenizer.

    Raises:
        ConfigError: The run trains LoRA adapters only.
        DataError: The run's config.json does not name it.
    """
    path = folder.resolve().parents[1] / "config.json"
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))["settings"]
        model, rank = settings["model"], settings["lora"]["rank"]
        source = model["path"] or model["from_scratch"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} is a checkpoint of a run that does not name its model ({path}: {type(error).__name__}); "
            "give --model-config, the folder of the run's base model."
        ) from error
    require(rank == 0, f"{folder} has LoRA adapters only; convert {path.parent / 'export'}, where they are merged.")
    return str(source)


def open_checkpoint(folder: Path, model_config: str) -> Weights:
    """Verify a checkpoint against its manifest and return its weights.

    Raises:
        CheckpointError: A file is damaged, or a weight is missing.
        DataError: A weight's shape differs from the configuration's.
    """
    require_safe_files("--model-config", model_config)
    config = load_config(model_config)
    saved, shapes = canonical.transformers_view(folder, config), shapes_of(config)

    def fetch(name: str) -> Tensor:
        tensor = saved.read(name, WEIGHT)
        require_fitting(str(folder), {name: shapes[name]}, {name: tensor.shape})
        return tensor

    return Weights(config, torch.float32, shapes, fetch)
