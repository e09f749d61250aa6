"""Rebuild a published file from the rows of its public dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from evaluate_zero_shot.tasks import Task
from evaluate_zero_shot.texts.known_files import KNOWN
from megaft.base.errors import DataError
from megaft.base.files import naming_disk_errors, replacing

LoadRows = Callable[[str, str], Iterable[str]]
"""Dataset and configuration -> the text of its test rows; raises OSError if the hub is out of reach."""


def offline_variable(environment: Mapping[str, str]) -> str | None:
    """Return the environment variable that puts Hugging Face's libraries in offline mode; None if none is set."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return next((name for name in names if environment.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}), None)


def load_rows(dataset: str, configuration: str) -> Iterable[str]:
    """Return the text of the test rows, through the package `datasets`.

    Raises:
        OSError: The package is not installed, or the hub is out of reach.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise OSError("the package datasets is not installed (pip install datasets)") from error
    try:
        return datasets.load_dataset(dataset, configuration, split="test")["text"]
    except DatasetsError as error:
        raise OSError(str(error)) from error


def write_file(rows: Iterable[str], path: Path, task: Task) -> None:
    """Rebuild a task's data file from the rows of its dataset, and write it atomically.

    Raises:
        DataError: The SHA-256 is not that of a published file of the task: the dataset has changed.
        ConfigError: The file cannot be written.
    """
    content = rebuild(rows, task)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    known = KNOWN.get(sha256)
    if known is None or task.name not in known.tasks:
        raise DataError(
            f"The hub's rows give a {path.name} of SHA-256 {sha256[:8]}, not a published file; pass a copy "
            "of the published file with --data."
        )
    with naming_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content)


def rebuild(rows: Iterable[str], task: Task) -> str:
    r"""Return the text of the file. WikiText's rows are its lines, but "" where the file has " \n"."""
    if task.kind == "last-word":
        return "".join(json.dumps({"text": row}) + "\n" for row in rows)
    return "".join(row or " \n" for row in rows)
