"""`megaft convert`: convert a model's weights to another format, tensor-parallel size or dtype.

It reads and writes one tensor at a time, and imports torch only after the flags are parsed.
"""

from __future__ import annotations

import time
from pathlib import Path

from megaft.base.errors import DataError
from megaft.base.new_folder import publishing_folder, require_new
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

    require_new("--to", config.to)
    source = model_folder(config.source)
    weights = open_weights(source, model_config=config.model_config, verify_hashes=True)
    dtype = getattr(torch, config.dtype) if config.dtype else weights.dtype
    num_bytes, begin = weights.num_parameters * dtype.itemsize, time.perf_counter()
    with publishing_folder("--to", config.to, num_bytes) as folder:
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
