"""Resolve a model or run folder to the folder of the model's files. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megaft.base.errors import DataError


def model_folder(source: str, setting: str = "model") -> str:
    """Return a model folder; for a run folder, its export/.

    Raises:
        DataError: The run's export/ holds no model.
    """
    export = Path(source) / "export"
    if not export.is_dir():
        return source
    if not (export / "config.json").is_file():
        raise DataError(f"{setting} is {source}, a run whose export/ has no config.json; export or copy it again.")
    return str(export)


def model_source(model: str) -> str:
    """Return a folder that transformers can load, or a hub name; for a run folder, its export/.

    Raises:
        DataError: The folder has no model.
    """
    source = model_folder(model, "--model")
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"--model is {model}, a folder with neither config.json nor export/; "
            "give a model folder, or the folder of a finished run."
        )
    return source
