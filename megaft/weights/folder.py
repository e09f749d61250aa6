"""Folder of a model's files, which for a run is its export/. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megaft.base.errors import DataError


def model_folder(source: str, setting: str = "model") -> str:
    """Return the folder of a model's files; for a run's folder, its export/.

    Raises:
        DataError: The run's export/ holds no model.
    """
    export = Path(source) / "export"
    if not export.is_dir():
        return source
    if not (export / "config.json").is_file():
        raise DataError(
            f"{setting} is {source}, a run whose export/ has no config.json; export it again, or copy it anew."
        )
    return str(export)


def model_source(model: str) -> str:
    """Return the folder of the files of a model that can be run, or its hub name; for a run's folder, its export/.

    Raises:
        DataError: The folder holds no model.
    """
    source = model_folder(model, "--model")
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"--model is {model}, a folder with neither config.json nor export/; "
            "give a model's folder, or a run's after it has ended."
        )
    return source
