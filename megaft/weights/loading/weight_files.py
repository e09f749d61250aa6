"""Checks of a model's weight files: present, whole, not quantized, and the weights that config.json describes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megaft.base.errors import DataError
from megaft.base.files import LONGEST_NAME, parse_json
from megaft.weights.loading.size_limit import Size

INDEX = "model.safetensors.index.json"
"""Index of the weight files of a sharded model."""

BIN_TENSOR_BYTES = 64
"""Bytes that a .bin file needs at least for every tensor: its description, and the header of its values."""

_LFS_POINTER = b"version https://git-lfs"

BUFFERS = re.compile(r"\.(attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
"""Names of tensors that older versions of transformers stored beside weights, and newer ones compute."""

QUANTIZED = re.compile(r"[IU]8$|F(4|6_|8_)")
"""Dtypes of quantized weights, by safetensors' names."""


def require_weights(folder: Path) -> Size:
    """Check the weight files before transformers reads them, whose messages do not name the bad one.

    Returns:
        The size of all of them together.

    Raises:
        DataError: There is none, or one is a Git LFS pointer or a safetensors file that is cut short or quantized; or
            there are two sets, of which different programs read different ones.
    """
    files = sorted(path for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern))
    if not files:
        raise DataError(f"{folder} has no weights; copy its model.safetensors there, or give another model.")
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file() and index.is_file():
        raise DataError(f"{folder} has {single.name} and {index.name}; remove the one that is not the model's.")
    if index.is_file() and (missing := sorted(name for name in shard_names(index) if not (folder / name).is_file())):
        raise DataError(f"{folder} has no {missing[0]}, which its {INDEX} names; copy it there.")
    sizes = []
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is no file, or leads to none; copy the model anew.")
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise DataError(f"{path} is a Git LFS pointer, not weights; run git lfs pull in {folder}.")
        sizes.append(_require_whole(path) if path.suffix == ".safetensors" else _largest_size(path))
    return Size(*map(sum, zip(*sizes, strict=True)))


def shard_names(index: Path) -> set[str]:
    """Return the names of the files that an index of weights lists; DataError where it is no index."""
    try:
        names = set(map(str, parse_json(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is damaged ({type(error).__name__}: {error}); copy it anew.") from error
    if impossible := [name for name in names if len(name.encode(errors="replace")) > LONGEST_NAME]:
        raise DataError(f"{index} names {impossible[0][:40]}..., too long for a file; copy it anew.")
    return names


def _require_whole(path: Path) -> Size:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            size = Size(len(slices), sum(math.prod(part.get_shape()) for part in slices.values()))
    except SafetensorError as error:
        raise DataError(f"{path} is cut short or damaged ({error}); copy it anew.") from error
    quantized = [name for name, kind in kinds.items() if QUANTIZED.match(kind) and not BUFFERS.search(name)]
    if quantized:
        raise DataError(
            f"{path} stores {quantized[0]} as {kinds[quantized[0]]} ({len(quantized)} such), which is quantized; "
            "give the model it was made from."
        )
    return size


def _largest_size(path: Path) -> Size:
    """Return the largest size that the weights of a .bin file can have, which is not opened."""
    num_bytes = path.stat().st_size
    return Size(num_bytes // BIN_TENSOR_BYTES, num_bytes // 2)


def require_not_quantized(setting: str, source: str, config: Any) -> None:
    """Raise DataError where a transformers configuration says that the weights are quantized."""
    if getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None):
        raise DataError(
            f"{setting} is {source}, which is quantized (its config.json has quantization_config); "
            "give the model it was made from."
        )


def require_complete(model: str, report: dict[str, Any]) -> None:
    """Refuse weights that are not those of config.json, by the loading report of transformers, which would only warn.

    A weight that is missing would start random, and one too many would be left out.

    Args:
        model: How the message names the model, such as "--model.path is DIR".
        report: transformers'.

    Raises:
        DataError: A weight is missing, of another shape, or one too many.
    """
    wrong = dict.fromkeys(report["missing_keys"], "is missing")
    wrong |= {name: f"is {list(file)}, not {list(config)}" for name, file, config in report["mismatched_keys"]}
    if wrong:
        name = min(wrong)
        raise DataError(
            f"{model}; its weights do not fit its config.json: {name} {wrong[name]} "
            f"({len(wrong)} such). Copy both from one model."
        )
    require_no_more(model, (), sorted(report["unexpected_keys"]))


def require_no_more(model: str, expected: Collection[str], found: Iterable[str]) -> None:
    """Refuse stored weights that config.json has no place for, as those of layers beyond num_hidden_layers.

    Args:
        model: How the message names the model, such as "--model.path is DIR".
        expected: Names that are weights of the model.
        found: Names of stored tensors.

    Raises:
        DataError: There is one that is neither expected nor a buffer that transformers computes itself.
    """
    more = [name for name in found if name not in expected and not BUFFERS.search(name)]
    if more:
        raise DataError(
            f"{model}; its weights do not fit its config.json, which has no {more[0]} ({len(more)} such). "
            "Copy both from one model, or remove them from a copy of the weights."
        )


def untied_weights(model: str, head: str, embedding: str) -> DataError:
    """Return the error for two weights that config.json ties and the files store with different values."""
    return DataError(
        f"{model}; its config.json ties {head} to {embedding}, but the stored tensors differ. "
        "Set tie_word_embeddings to false in a copy of config.json to use both."
    )
