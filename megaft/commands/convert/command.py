"""`megaft convert`: a model's weights in another format, cut for another number of ranks, or in another dtype.

It reads and writes tensor by tensor. Imports no torch until there is something to do.
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
"""Least length in characters of the text of --verify."""


def main(config: ConvertConfig) -> int:
    """Write the folder, say how long it took, and compare it with its source if asked to.

    Raises:
        ConfigError: The folder exists, or the disk has no room for it.
        DataError: The source cannot be read.
        NumericsError: The two models differ on the text.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars over the files of a model
    import torch

    from megaft.base.dtypes import dtype_name
    from megaft.weights import writing
    from megaft.weights.folder import model_folder
    from megaft.weights.reading import config_source, open_weights

    require_new(config.to)
    source = model_folder(config.source)
    weights = open_weights(source, model_config=config.model_config, is_hashed=True)
    dtype = getattr(torch, config.dtype) if config.dtype else weights.dtype
    num_bytes, begin = weights.num_parameters * dtype.itemsize, time.perf_counter()
    with publishing(config.to, num_bytes) as folder:
        if config.format == "megatron":
            made_from = without_folders(without_secrets(config.source))
            writing.write_megatron(weights, folder, dtype, config.tensor_parallel_size, made_from)
        else:
            writing.write_hugging_face(weights, folder, dtype)
        writing.copy_companions(config_source(source, config.model_config), folder)
        open_weights(str(folder))  # reads what was written as any other model: names, shapes and ties
    seconds = time.perf_counter() - begin
    name = dtype_name(dtype)
    print(f"wrote {config.to}: {weights.num_parameters:,} parameters in {name}, {num_bytes:,} bytes in {seconds:.1f} s")
    if config.verify:
        verify(config, source, name)
    return 0


def verify(config: ConvertConfig, source: str, dtype: str) -> None:
    """Compare the folder with what it was made from, and print the difference.

    Raises:
        DataError: The text cannot be read, or a model cannot be run.
        NumericsError: They differ.
    """
    from megaft.commands.convert import verify as verify_conversion
    from megaft.commands.convert.verify import Side

    text = verify_conversion.TEXT if config.text is None else read_text(config.text)
    sides = Side(source, config.model_config), Side(str(config.to))
    difference = verify_conversion.verify(*sides, dtype, text)
    print(
        f"verified on {difference.num_tokens} tokens: {difference.mean:.6f} nats a token; a token's differ by "
        f"{difference.largest:.2e} at most, the mean by {difference.relative:.2e} of it"
    )


def read_text(path: Path) -> str:
    """Return a text file's contents; DataError where it cannot be read or has nothing to predict."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--text is {path}, which cannot be read ({error}); give a text file in UTF-8.") from error
    if len(text) < MIN_TEXT:
        raise DataError(f"--text is {path}, which has {counted(len(text), 'character')}; give {MIN_TEXT} or more.")
    return text


def require_new(folder: Path) -> None:
    """Raise ConfigError where there is something already."""
    require(not os.path.lexists(folder), f"--to is {folder}, which exists; name a folder that does not, or remove it.")


@contextmanager
def publishing(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder`, on disk, when the block ends, and is removed when it raises.

    Raises:
        ConfigError: There is no room for so many bytes, the disk refuses, or there is such a folder by then.
    """
    temporary = folder.with_name(f".{folder.name}.converting")
    with naming_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of one that was killed
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes:
            raise ConfigError(f"--to is {folder}, which needs {num_bytes:,} bytes of {free:,} free; free space there.")
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
