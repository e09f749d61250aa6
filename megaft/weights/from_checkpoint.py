"""The weights of a run's checkpoint, by transformers' names: in fp32, whichever modules and ranks wrote it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megaft.base.checks import require
from megaft.base.errors import DataError
from megaft.base.files import parse_json
from megaft.base.foreign import require_inert
from megaft.weights import canonical
from megaft.weights.checkpoint_reader import WEIGHT
from megaft.weights.parameters import Weights, load_config, require_fitting, shapes_of


def base_model_of_run(folder: Path) -> str:
    """Return the model that a checkpoint's run began with, which has the configuration and the tokenizer.

    Raises:
        ConfigError: The run trains adapters, which are not a model's weights.
        DataError: The run does not say.
    """
    path = folder.resolve().parents[1] / "config.json"
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))["settings"]
        model, rank = settings["model"], settings["lora"]["rank"]
        source = model["path"] or model["from_scratch"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} is a checkpoint whose run does not say what model it trains ({path}: {type(error).__name__}); "
            "give --model-config, the folder of the model it began with."
        ) from error
    require(rank == 0, f"{folder} has adapters only; convert {path.parent / 'export'}, which has them merged.")
    return str(source)


def open_checkpoint(folder: Path, model_config: str) -> Weights:
    """Return the weights of a checkpoint whose files all have the size and hash of its manifest.

    Raises:
        CheckpointError: They have not, or a weight is missing.
        DataError: A weight has not the shape of the configuration.
    """
    require_inert("model-config", model_config)
    config = load_config(model_config)
    saved, shapes = canonical.transformers_view(folder, config), shapes_of(config)

    def fetch(name: str) -> Tensor:
        tensor = saved.read(name, WEIGHT)
        require_fitting(str(folder), {name: shapes[name]}, {name: tensor.shape})
        return tensor

    return Weights(config, torch.float32, shapes, fetch)
