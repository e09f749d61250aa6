"""`megaft convert`: convert a model's weights to another format, tensor-parallel size or dtype.

It reads and writes one tensor at a time, and imports torch only after the flags are parsed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaft.base.checks import require
from megaft.base.errors import ConfigError, DataError
from megaft.base.files import fsync, naming_disk_errors
from megaft.base.plural import counted
from megaft.base.redaction import without_folders, without_secrets
from megaft.commands.convert.config import ConvertConfig

MIN_TEXT = 100
"""Smallest length in characters of the text for --verify."""


def main(config: ConvertConfig) -> int:
    """Write the converted folder, print a summary, and with --verify compare it with the source.

    Raises:
        ConfigError: The folder exists, or the disk has no room for it.
        DataError: The source cannot be read.
        NumericsError: The two models differ on the text.
    """
    import torch

    from megaft.base.dtypes import dtype_name
    from megaft.weights import writing
    from megaft.weights.folder import model_folder
    from megaft.weights.reading import config_source, open_weights

    require_new(config.to)
    source = model_folder(config.source)
    weights = open_weights(source, model_config=config.model_config, verify_hashes=True)
    dtype = getattr(torch, config.dtype) if config.dtype else weights.dtype
    num_bytes, begin = weights.num_parameters * dtype.itemsize, time.perf_counter()
    with publishing(config.to, num_bytes) as folder:
        if config.format == "megatron":
            made_from = without_folders(without_secrets(config.source))
            writing.write_megatron(weights, folder, dtype, config.tensor_parallel_size, made_from)
        else:
            writing.write_hugging_face(weights, folder, dtype)
        writing.copy_companions(config_source(source, config.model_config), folder)
        open_weights(str(folder))  # checks names, shapes and ties of the result, as of any other model
    seconds = time.perf_counter() - begin
    name = dtype_name(dtype)
    print(f"wrote {config.to}: {weights.num_parameters:,} parameters in {name}, {num_bytes:,} bytes in {seconds:.1f} s")
    if config.verify:
        verify(config, source, name)
    return 0


def verify(config: ConvertConfig, source: str, dtype: str) -> None:
    """Compare the nats of the converted model with those of its source, and print the difference.

    Raises:
        DataError: The text cannot be read, or a model cannot be run.
        NumericsError: The models differ.
    """
    from megaft.commands.convert import verify as verify_conversion
    from megaft.commands.convert.verify import ComparedModel

    text = verify_conversion.TEXT if config.text is None else read_text(config.text)
    sides = ComparedModel(source, config.model_config), ComparedModel(str(config.to))
    difference = verify_conversion.verify(*sides, dtype, text)
    print(
        f"verified on {difference.num_tokens} tokens: {difference.mean:.6f} nats per token; largest difference of a "
        f"token {difference.largest:.2e} nats, relative difference of the mean {difference.relative:.2e}"
    )


def read_text(path: Path) -> str:
    """Return the contents of a text file.

    Raises:
        DataError: The file cannot be read, or is too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--text is {path}, which cannot be read ({error}); give a text file in UTF-8.") from error
    if len(text) < MIN_TEXT:
        raise DataError(f"--text is {path}, which has {counted(len(text), 'character')}; give {MIN_TEXT} or more.")
    return text


def require_new(folder: Path) -> None:
    """Raise ConfigError if the folder exists."""
    require(not os.path.lexists(folder), f"--to is {folder}, which already exists; give a new folder, or remove it.")


@contextmanager
def publishing(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a temporary folder that is synced and renamed to `folder` at the end of the block, or removed on error.

    Raises:
        ConfigError: The disk has no room or cannot be written, or `folder` exists by the end.
    """
    temporary = folder.with_name(f".{folder.name}.converting")
    with naming_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes:
            raise ConfigError(
                f"--to is {folder}, which needs {num_bytes:,} bytes, but only {free:,} are available; delete "
                "files there, or choose another disk."
            )
        temporary.mkdir()
        try:
            yield temporary
            for path in (*temporary.iterdir(), temporary):
                fsync(path)
            require_new(folder)
            temporary.rename(folder)
            fsync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
