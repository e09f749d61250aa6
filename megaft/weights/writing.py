"""Write a model's weights one tensor at a time, as a transformers folder or as one file per tensor-parallel rank.

All files are opened and their headers, which depend only on the shapes, are written first. Then each parameter is read,
rounded, sharded and written before the next. Memory is bounded by the largest parameter.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaft.base.dtypes import dtype_name
from megaft.base.errors import DataError
from megaft.base.files import write_json_atomic
from megaft.data.tokenizer import load_tokenizer
from megaft.weights.layout import layout_of
from megaft.weights.loading.finite_weights import is_finite, require_finite
from megaft.weights.loading.weight_files import INDEX
from megaft.weights.megatron_folder import FORMAT, MANIFEST, local_shapes
from megaft.weights.parameters import Weights
from megaft.weights.reading import file_of
from megaft.weights.tensor_file import TensorWriter

SHARD_BYTES = 5_000_000_000
"""Largest file of a transformers folder, unless a single tensor is larger."""

COMPANIONS = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""Files of a model folder other than its configuration and weights."""


def write_hugging_face(weights: Weights, folder: Path, dtype: torch.dtype) -> None:
    """Write a folder that transformers loads.

    Raises:
        DataError: A weight cannot be read, is not finite, or is too large for the dtype.
    """
    files = _shapes_by_file(weights, dtype)
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for name, shapes in zip(names, files, strict=True):
        writer = TensorWriter(folder / name, shapes, dtype)
        for parameter in shapes:
            writer.write(rounded(parameter, weights.read(parameter), dtype))
        writer.close()
    if len(files) > 1:
        weight_map = {parameter: name for name, shapes in zip(names, files, strict=True) for parameter in shapes}
        total = {"total_size": weights.num_parameters * dtype.itemsize}
        write_json_atomic(folder / INDEX, {"metadata": total, "weight_map": weight_map})
    _write_config(weights.config, folder, dtype)


def _shapes_by_file(weights: Weights, dtype: torch.dtype) -> list[dict[str, torch.Size]]:
    """Return the parameter shapes of each file."""
    files, num_bytes = [{}], 0
    for name, shape in weights.shapes.items():
        more = shape.numel() * dtype.itemsize
        if files[-1] and num_bytes + more > SHARD_BYTES:
            files.append({})
            num_bytes = 0
        files[-1][name] = shape
        num_bytes += more
    return files


def write_megatron(weights: Weights, folder: Path, dtype: torch.dtype, size: int, source: str) -> None:
    """Write a folder with the shards of `size` tensor-parallel ranks of megatron-core, and a manifest.

    Raises:
        ConfigError: The model cannot be sharded over that many ranks.
        DataError: A weight cannot be read, is not finite, or is too large for the dtype.
    """
    layout = layout_of(weights.config)
    layout.dims.require_shardable(size, "--tensor-parallel-size")
    writers = [
        TensorWriter(
            folder / f"tensor-parallel-{rank:02}-of-{size:02}.safetensors",
            local_shapes(layout, weights.shapes, size, rank),
            dtype,
        )
        for rank in range(size)
    ]
    for name, rule in layout.rules.items():
        tensors = [rounded(parameter, weights.read(parameter), dtype) for parameter in rule.sources]
        for rank, writer in enumerate(writers):
            writer.write(layout.local(name, tensors, size, rank))
    written = {writer.path.name: writer.close() for writer in writers}
    manifest = {
        "format": FORMAT,
        "tensor_parallel_size": size,
        "dtype": dtype_name(dtype),
        "source": source,
        "files": {name: {"bytes": num_bytes, "sha256": sha256.hex()} for name, (num_bytes, sha256) in written.items()},
    }
    _write_config(weights.config, folder, dtype)
    write_json_atomic(folder / MANIFEST, manifest)


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a parameter to a dtype.

    Raises:
        DataError: A value is not finite, or too large for the dtype.
    """
    result = require_finite(name, tensor).to(dtype)
    if not is_finite(result):
        target = dtype_name(dtype)
        fix = "use bfloat16" if dtype == torch.float16 else "use float32"
        raise DataError(f"{name} has values up to {tensor.abs().max():g}, which {target} cannot represent; {fix}.")
    return result


def _write_config(config: Any, folder: Path, dtype: torch.dtype) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    written = copy.deepcopy(config)
    written.dtype = dtype
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    written.architectures = [model_class.__name__]
    written.to_json_file(folder / "config.json")


def copy_companions(source: str, folder: Path) -> None:
    """Copy the tokenizer and generation files of a model folder or hub model.

    From a GGUF file, write its tokenizer. A bare config.json has none.
    """
    if source.endswith(".gguf"):
        load_tokenizer(source).save(folder)
        return
    if Path(source).is_file():
        return
    for name in COMPANIONS:
        if path := file_of(source, name):
            shutil.copyfile(path, folder / name)
