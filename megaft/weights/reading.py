"""Open a model's weights from any supported format: model folder, GGUF file, run or checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megaft.base.checks import require
from megaft.base.errors import DataError
from megaft.base.hub import find_file
from megaft.base.untrusted import require_safe_files
from megaft.weights.classic_megatron import ClassicCheckpoint, is_classic
from megaft.weights.families import family_of
from megaft.weights.folder import model_folder
from megaft.weights.layout import OUTPUT_LAYER, layout_of
from megaft.weights.loading.finite_weights import require_finite
from megaft.weights.loading.pretrained import load_language_model, require_exists
from megaft.weights.loading.size_limit import Size, no_larger_than
from megaft.weights.loading.weight_files import (
    INDEX,
    require_no_more,
    require_not_quantized,
    require_weights,
    shard_names,
    untied_weights,
)
from megaft.weights.manifest import is_checkpoint
from megaft.weights.megatron_folder import is_megatron_folder, local_shapes, shards_of
from megaft.weights.parameters import (
    Weights,
    from_shards,
    load_config,
    naming_config_errors,
    require_fitting,
    shapes_of,
    widest_dtype,
)
from megaft.weights.tensor_file import TensorFile, open_tensors


def open_weights(source: str, *, model_config: str | None = None, verify_hashes: bool = False) -> Weights:
    """Locate a model's weights and check their names and shapes, without reading values.

    Args:
        source: A model folder, a hub name, a GGUF file, a folder written by `megaft convert`, a run folder, a classic
            Megatron-LM checkpoint, or a checkpoint of a run.
        model_config: Source of config.json for a checkpoint that does not describe its model.
        verify_hashes: Verify the SHA-256 of a converted folder's files too, which reads them once more.

    Raises:
        ConfigError: The megatron backend does not support the model's family.
        DataError: The source does not exist, requires custom code, or its weights do not match its configuration.
    """
    source = model_folder(source)
    folder = Path(source)
    require_exists(source, "model")
    if is_classic(folder):
        return _from_classic(folder, model_config)
    if is_checkpoint(folder):
        from megaft.weights.from_checkpoint import open_checkpoint

        return open_checkpoint(folder, config_source(source, model_config))
    require(
        model_config is None,
        f"--model-config is {model_config}, which has no effect: {source} has a config.json; drop it.",
    )
    require_safe_files("the model", source)
    if is_megatron_folder(folder):
        return _from_megatron(folder, verify_hashes)
    files = [] if folder.suffix == ".gguf" else _safetensors_of(source)
    return _from_safetensors(source, files) if files else _from_transformers(source)


def config_source(source: str, model_config: str | None) -> str:
    """Return the source of a model's configuration and tokenizer, which checkpoints do not contain."""
    if model_config is None and is_checkpoint(Path(source)):
        from megaft.weights.from_checkpoint import base_model_of_run

        return base_model_of_run(Path(source))
    return model_config or source


def _safetensors_of(source: str) -> list[TensorFile]:
    """Return the safetensors files of a folder or hub model; empty if its weights have another format."""
    if Path(source).is_dir():
        require_weights(Path(source))
    index = file_of(source, INDEX)
    names = sorted(shard_names(index)) if index else ["model.safetensors"]
    paths = {name: file_of(source, name) for name in names}
    if index and (missing := [name for name, path in paths.items() if path is None]):
        raise DataError(f"model is {source}; {missing[0]}, which {index.name} lists, is missing. Copy it again.")
    return [open_tensors(path) for path in paths.values() if path]


def file_of(source: str, name: str) -> Path | None:
    """Return a file of a model folder or hub model; None if it has none, or the hub cannot be reached.

    Raises:
        DataError: The model cannot exist.
    """
    try:
        return find_file(source, name)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"model is {source}; give a folder, a GGUF file or a hub name. {reason}") from error


def folder_of(source: str) -> Path:
    """Return the local folder of a model folder or hub model."""
    return Path(source) if Path(source).is_dir() else Path(str(file_of(source, "config.json"))).parent


def _from_safetensors(source: str, files: list[TensorFile]) -> Weights:
    config = load_config(source)
    require_not_quantized("model", source, config)
    holders = {name: file for file in files for name in file.spans}
    with no_larger_than(_size_of(files), f"model is {source}"):
        shapes = shapes_of(config)
    family = family_of(config)  # in other families transformers renames parameters when loading
    family.require_layout(config)
    prefix = family.base_prefix
    stored = {name: name if name in holders else name.removeprefix(prefix) for name in shapes}
    stored_shapes = {name: holders[key].spans[key].shape for name, key in stored.items() if key in holders}
    require_fitting(source, shapes, stored_shapes)
    _require_tied(source, stored[family.embedding], holders, stored)
    require_no_more(f"model is {source}", {*stored.values(), OUTPUT_LAYER}, holders)

    def fetch(name: str) -> Tensor:
        return holders[stored[name]].read(stored[name])

    return Weights(config, widest_dtype(holders[key].dtype(key) for key in stored.values()), shapes, fetch)


def _size_of(files: list[TensorFile]) -> Size:
    shapes = [span.shape for file in files for span in file.spans.values()]
    return Size(len(shapes), sum(shape.numel() for shape in shapes))


def _require_tied(source: str, embedding: str, holders: dict[str, TensorFile], stored: dict[str, str]) -> None:
    """Refuse a stored output layer that config.json ties to the embedding and that differs from it."""
    if OUTPUT_LAYER not in holders or OUTPUT_LAYER in stored:
        return
    pair = [require_finite(key, holders[key].read(key), f"model is {source}; ") for key in (OUTPUT_LAYER, embedding)]
    if not torch.equal(*pair):
        raise untied_weights(f"model is {source}", OUTPUT_LAYER, embedding)


def _from_transformers(source: str) -> Weights:
    dtype = torch.float32 if source.endswith(".gguf") else load_config(source).dtype or torch.float32
    model = load_language_model(source, dtype, setting="model")
    layout_of(model.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = model.state_dict()
    return Weights(model.config, model.dtype, shapes, lambda name: state[name].clone())


def _from_megatron(folder: Path, verify_hashes: bool) -> Weights:
    config = load_config(str(folder))
    files = shards_of(folder, config, verify_hashes=verify_hashes)
    dtype = widest_dtype(file.dtype(name) for file in files for name in file.spans)
    return from_shards(config, dtype, lambda name: [file.read(name) for file in files])


def _from_classic(folder: Path, model_config: str | None) -> Weights:
    if model_config is not None:
        require_safe_files("--model-config", model_config)
    checkpoint = ClassicCheckpoint.open(folder)
    with naming_config_errors(str(folder)):
        config = checkpoint.config() if model_config is None else load_config(model_config)
    layout, shapes, size = layout_of(config), shapes_of(config), len(checkpoint.ranks)
    checkpoint.require_known_tensors(layout)
    for rank in range(size):
        expected = checkpoint.padded_shapes(layout, local_shapes(layout, shapes, size, rank))
        require_fitting(f"{folder} (rank {rank})", expected, checkpoint.shapes(rank))
    dtype = widest_dtype(tensor.dtype for tensors in checkpoint.ranks for tensor in tensors.values())
    return from_shards(config, dtype, lambda name: checkpoint.read(name, layout))
