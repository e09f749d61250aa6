"""Check a model's weight files: present, complete, not quantized, and matching config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megaft.base.errors import DataError
from megaft.base.files import MAX_NAME_BYTES, parse_json
from megaft.base.plural import counted
from megaft.weights.loading.size_limit import Size

INDEX = "model.safetensors.index.json"
"""Index of the weight files of a sharded model."""

BIN_TENSOR_BYTES = 64
"""Minimum bytes of a tensor in a .bin file: its metadata and the header of its data."""

_LFS_POINTER = b"version https://git-lfs"

BUFFERS = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
"""Names of buffers that older versions of transformers stored and newer ones compute."""

QUANTIZED = re.compile(r"[IU]8$|F(4|6_|8_)")
"""Safetensors' dtype names of quantized weights."""


def require_weights(folder: Path) -> Size:
    """Check the weight files before loading, because transformers' errors do not name the file.

    Returns:
        Their total size.

    Raises:
        DataError: There is no file; one is a Git LFS pointer, truncated or quantized; or there are two sets, of which
            different programs would read different ones.
    """
    files = sorted(path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
    if not files:
        raise DataError(f"{folder} has no weights; copy its model.safetensors there, or give another model.")
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() and index.is_file():
        raise DataError(f"{folder} has both {single.name} and {index.name}; remove the one that is not the model's.")
    if index.is_file() and (missing := sorted(name for name in shard_names(index) if not (folder / name).is_file())):
        raise DataError(f"{folder} has no {missing[0]}, which its {INDEX} lists; copy it there.")
    sizes = []
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is a folder or a broken link; copy the model again.")
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise DataError(f"{path} is a Git LFS pointer, not weights; run git lfs pull in {folder}.")
        sizes.append(_require_whole(path) if path.suffix == ".safetensors" else _largest_size(path))
    return Size(*map(sum, zip(*sizes, strict=True)))


def shard_names(index: Path) -> set[str]:
    """Return the file names in a weight index; DataError if it is invalid."""
    try:
        names = set(map(str, parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged ({type(error).__name__}: {error}); copy it again.") from error
    if too_long := [name for name in names if len(name.encode(errors="replace")) > MAX_NAME_BYTES]:
        raise DataError(f"{index} lists {too_long[0][:40]}..., which is too long for a file name; copy it again.")
    return names


def _require_whole(path: Path) -> Size:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: tensor.get_dtype() for name, tensor in slices.items()}
            size = Size(len(slices), sum(math.prod(tensor.get_shape()) for tensor in slices.values()))
    except SafetensorError as error:
        raise DataError(f"{path} is truncated or damaged ({error}); copy it again.") from error
    quantized = [name for name, kind in kinds.items() if QUANTIZED.match(kind) and not BUFFERS.search(name)]
    if quantized:
        raise DataError(
            f"{path} stores {counted(len(quantized), 'quantized tensor')}, such as {quantized[0]} as "
            f"{kinds[quantized[0]]}; give the unquantized model."
        )
    return size


def _largest_size(path: Path) -> Size:
    """Return the largest possible size of the weights in a .bin file, without opening it."""
    num_bytes = path.stat().st_size
    return Size(num_bytes // BIN_TENSOR_BYTES, num_bytes // 2)


def require_not_quantized(setting: str, source: str, config: Any) -> None:
    """Refuse a transformers configuration with quantized weights."""
    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise DataError(
            f"{setting} is {source}, which is quantized (its config.json has quantization_config); "
            "give the unquantized model."
        )


def require_complete(model: str, report: dict[str, Any]) -> None:
    """Refuse weights that do not match config.json, from transformers' loading report, which would only warn.

    Missing weights would stay random, and extra weights would be ignored.

    Args:
        model: Setting and value for the message, such as "--model.path is DIR".
        report: transformers' loading report.

    Raises:
        DataError: A weight is missing, has another shape, or is unexpected.
    """
    wrong = dict.fromkeys(report["missing_keys"], "is missing")
    wrong |= {name: f"is {list(stored)}, not {list(expected)}" for name, stored, expected in report["mismatched_keys"]}
    if wrong:
        name = min(wrong)
        raise DataError(
            f"{model}; its weights do not fit its config.json: {name} {wrong[name]} "
            f"({len(wrong)} in all). Copy both from one model."
        )
    require_no_more(model, (), sorted(report["unexpected_keys"]))


def require_no_more(model: str, expected: Collection[str], stored: Iterable[str]) -> None:
    """Refuse unexpected stored weights, such as those of layers beyond num_hidden_layers.

    Args:
        model: Setting and value for the message, such as "--model.path is DIR".
        expected: Names of the model's weights.
        stored: Names of stored tensors.

    Raises:
        DataError: A tensor is neither expected nor a buffer that transformers computes.
    """
    unexpected = [name for name in stored if name not in expected and not BUFFERS.search(name)]
    if unexpected:
        raise DataError(
            f"{model}; its weights do not fit its config.json, which has no {unexpected[0]} "
            f"({len(unexpected)} in all). Copy both from one model, or remove them from a copy of the weights."
        )


def untied_weights(model: str, head: str, embedding: str) -> DataError:
    """Return the error for two weights that config.json ties but whose stored values differ."""
    return DataError(
        f"{model}; its config.json ties {head} to {embedding}, but the stored tensors differ. "
        "Set tie_word_embeddings to false in a copy of config.json to use both."
    )
