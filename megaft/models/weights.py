"""The weights of a model by transformers' names, tensor by tensor, whatever they are stored as.

Memory is bounded by the largest parameter, except for `.bin` and GGUF files, which transformers loads whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache, reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from megaft.config import require
from megaft.errors import DataError
from megaft.files import is_file_name, parse_json, sha256_of
from megaft.foreign import require_inert
from megaft.hub import find_file
from megaft.models.classic_megatron import ClassicCheckpoint, is_classic
from megaft.models.config_errors import padding_rule
from megaft.models.finite_weights import require_finite
from megaft.models.hugging_face import load_language_model, require_there
from megaft.models.layout import Layout, layout_of
from megaft.models.size_limit import Size, no_larger_than
from megaft.models.tensor_file import TensorFile, open_tensors
from megaft.models.text_model import require_causal_class
from megaft.models.weight_files import (
    INDEX,
    require_no_more,
    require_not_quantized,
    require_weights,
    shard_names,
    untied_weights,
)
from megaft.plural import counted

MANIFEST = "megatron.json"
FORMAT = 1
"""Format version in the manifest of a megatron folder."""

CONFIG_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError),
    *(AssertionError, ImportError, StrictDataclassError),
)
"""Exceptions of transformers and torch for a config.json whose values make no model."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a model as transformers has them."""

    config: Any
    """transformers' configuration."""
    dtype: torch.dtype
    """Dtype that holds every stored value exactly."""
    shapes: dict[str, torch.Size]
    """Shapes of all parameters, without those tied to another."""
    fetch: Callable[[str], Tensor]

    @property
    def num_parameters(self) -> int:
        """Number of elements of all weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Transformers' names of all parameters, in its order."""
        return tuple(self.shapes)

    def shape(self, name: str) -> torch.Size:
        """Return a parameter's shape."""
        return self.shapes[name]

    def read(self, name: str) -> Tensor:
        """Return a parameter in the dtype it is stored in, in memory that it shares with nothing else.

        Raises:
            DataError: The disk refuses.
        """
        return self.fetch(name)


def open_weights(source: str, *, model_config: str | None = None, is_hashed: bool = False) -> Weights:
    """Find a model's weights and check their names and shapes; no value is read yet.

    Args:
        source: A model folder, a hub name, a GGUF file, a folder that `megaft convert` wrote, a run's folder, or a
            classic Megatron-LM checkpoint's, or a checkpoint of a run.
        model_config: For a checkpoint: where transformers' config.json is, if it does not say what it is of.
        is_hashed: Check the SHA-256 of a converted folder's files too, which reads them all once more.

    Raises:
        ConfigError: It is of a family without a layout.
        DataError: It is not there, asks for code, or its weights are not those of its configuration.
    """
    source = model_folder(source)
    folder = Path(source)
    require_there(source, "model")
    if is_classic(folder):
        return _from_classic(folder, model_config)
    if is_checkpoint(folder):
        from megaft.models.checkpoint_weights import open_checkpoint

        return open_checkpoint(folder, described_by(source, model_config))
    require(
        model_config is None,
        f"model-config is {model_config}, which has no effect: {source} has a config.json; drop it.",
    )
    require_inert("model", source)
    if (folder / MANIFEST).is_file():
        return _from_megatron(folder, is_hashed)
    files = [] if folder.suffix == ".gguf" else _safetensors_of(source)
    return _from_safetensors(source, files) if files else _from_whole(source)


def model_folder(source: str) -> str:
    """Return the folder of a model; for a run's folder, its export/."""
    export = Path(source) / "export"
    return str(export) if (export / "config.json").is_file() else source


def is_checkpoint(folder: Path) -> bool:
    """Return True if a folder is a checkpoint of a run."""
    return (folder / "manifest.json").is_file()


def described_by(source: str, model_config: str | None) -> str:
    """Return the source of a model's configuration and tokenizer, which a checkpoint does not contain."""
    if model_config is None and is_checkpoint(Path(source)):
        from megaft.models.checkpoint_weights import model_of_run

        return model_of_run(Path(source))
    return model_config or source


def load_config(source: str) -> Any:
    """Return transformers' configuration of a model.

    Raises:
        DataError: There is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    with naming_config_errors(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        require_causal_class(config)
    return config


@contextmanager
def naming_config_errors(source: str, config: Any = None) -> Iterator[None]:
    """Turn what transformers and torch say of a configuration that makes no model into a DataError.

    Args:
        source: Where it is from.
        config: It, if transformers could read it.
    """
    try:
        yield
    except CONFIG_ERRORS as error:
        reason = padding_rule(error, config) or " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"model is {source}; transformers makes no model of its config.json: {reason}") from error


def shapes_of(config: Any) -> dict[str, torch.Size]:
    """Return the shape of every parameter that transformers' model has, the tied ones once; no memory is taken.

    Raises:
        DataError: The configuration makes no model.
    """
    from transformers import AutoModelForCausalLM

    with naming_config_errors(config.name_or_path, config), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _safetensors_of(source: str) -> list[TensorFile]:
    """Return the safetensors files of a folder or of what the hub calls so; none where it has others only."""
    if Path(source).is_dir():
        require_weights(Path(source))
    index = file_of(source, INDEX)
    names = sorted(shard_names(index)) if index else ["model.safetensors"]
    found = {name: file_of(source, name) for name in names}
    if index and (missing := [name for name, path in found.items() if path is None]):
        raise DataError(f"model is {source}; its {missing[0]}, which {index.name} names, is not there. Copy it anew.")
    return [open_tensors(path) for path in found.values() if path]


def file_of(source: str, name: str) -> Path | None:
    """Return a file of a model's folder, or of what the hub calls so; None where it has none, or nobody can be asked.

    Raises:
        DataError: There can be no such model.
    """
    try:
        return find_file(source, name)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"model is {source}; give a folder, a GGUF file or a hub name. {reason}") from error


def _from_safetensors(source: str, files: list[TensorFile]) -> Weights:
    config = load_config(source)
    require_not_quantized("model", source, config)
    holders = {name: file for file in files for name in file.spans}
    with no_larger_than(_size_of(files), f"model is {source}"):
        shapes, prefix = shapes_of(config), _prefix(config)
    layout_of(config)  # of other families, transformers changes names between file and model
    stored = {name: name if name in holders else name.removeprefix(prefix) for name in shapes}
    found = {name: holders[key].spans[key].shape for name, key in stored.items() if key in holders}
    require_fitting(source, shapes, found)
    _require_tied(source, config, holders, stored)
    require_no_more(f"model is {source}", {*stored.values(), "lm_head.weight"}, holders)

    def fetch(name: str) -> Tensor:
        return holders[stored[name]].read(stored[name])

    return Weights(config, _widest(holders[key].dtype(key) for key in stored.values()), shapes, fetch)


def _size_of(files: list[TensorFile]) -> Size:
    shapes = [span.shape for file in files for span in file.spans.values()]
    return Size(len(shapes), sum(shape.numel() for shape in shapes))


def _prefix(config: Any) -> str:
    """Return transformers' prefix of the base model's parameter names, which files may leave out."""
    return "transformer." if config.model_type == "gpt2" else "model."


def _require_tied(source: str, config: Any, holders: dict[str, TensorFile], stored: dict[str, str]) -> None:
    """Raise DataError where an output layer that config.json ties to the embedding is stored with other values."""
    head = "lm_head.weight"
    if head not in holders or head in stored:
        return
    embedding = next(key for name, key in stored.items() if name.endswith(("wte.weight", "embed_tokens.weight")))
    pair = [require_finite(key, holders[key].read(key), f"model is {source}; ") for key in (head, embedding)]
    if not torch.equal(*pair):
        raise untied_weights(f"model is {source}", head, embedding)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _from_whole(source: str) -> Weights:
    dtype = torch.float32 if source.endswith(".gguf") else load_config(source).dtype or torch.float32
    model = load_language_model(source, dtype, setting="model")
    layout_of(model.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    state = model.state_dict()
    return Weights(model.config, model.dtype, shapes, lambda name: state[name].clone())


def _from_megatron(folder: Path, is_hashed: bool) -> Weights:
    config = load_config(str(folder))
    files = shards_of(folder, config, is_hashed=is_hashed)
    dtype = _widest(file.dtype(name) for file in files for name in file.spans)
    return from_shards(config, dtype, lambda name: [file.read(name) for file in files])


def shards_of(folder: Path, config: Any, *, is_hashed: bool = False) -> list[TensorFile]:
    """Return the file of each tensor-parallel rank in a converted folder, their sizes and shapes checked.

    Raises:
        DataError: One is missing or different; the message names it.
    """
    manifest = read_manifest(folder)
    layout, shapes, size = layout_of(config), shapes_of(config), manifest["tensor_parallel_size"]
    files = [_checked(folder, name, entry, is_hashed) for name, entry in sorted(manifest["files"].items())]
    if len(files) != size:
        raise DataError(
            f"{folder / MANIFEST} names {counted(len(files), 'file')} for {counted(size, 'rank')}; "
            "convert the model anew."
        )
    for rank, file in enumerate(files):
        found = {name: span.shape for name, span in file.spans.items()}
        require_fitting(str(file.path), local_shapes(layout, shapes, size, rank), found)
        require_no_more(f"model is {file.path}", layout.rules, found)
    return files


def from_shards(config: Any, dtype: torch.dtype, read: Callable[[str], list[Tensor]]) -> Weights:
    """Return the weights that `read` gives, by megatron-core's names, as every tensor-parallel rank has them."""
    layout = layout_of(config)

    @lru_cache(maxsize=1)  # queries, keys and values lie together and are asked for in turn
    def whole(name: str) -> dict[str, Tensor]:
        return layout.whole(name, read(name))

    return Weights(config, dtype, shapes_of(config), lambda name: whole(layout.rule_of(name))[name])


def _from_classic(folder: Path, model_config: str | None) -> Weights:
    if model_config is not None:
        require_inert("model-config", model_config)
    checkpoint = ClassicCheckpoint.open(folder)
    with naming_config_errors(str(folder)):
        config = checkpoint.config() if model_config is None else load_config(model_config)
    layout, shapes, size = layout_of(config), shapes_of(config), len(checkpoint.ranks)
    checkpoint.require_only(layout)
    for rank in range(size):
        expected = checkpoint.padded(layout, local_shapes(layout, shapes, size, rank))
        require_fitting(f"{folder} (rank {rank})", expected, checkpoint.shapes(rank))
    dtype = _widest(tensor.dtype for tensors in checkpoint.ranks for tensor in tensors.values())
    return from_shards(config, dtype, lambda name: checkpoint.read(name, layout))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a megatron folder.

    Raises:
        DataError: It is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
        known, files, _ = manifest["format"], manifest["files"], int(manifest["tensor_parallel_size"])
        for entry in files.values():
            _ = entry["bytes"], entry["sha256"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); convert the model anew.") from error
    if known != FORMAT:
        raise DataError(f"{path} has format {known}; this megaft reads {FORMAT}.")
    return manifest


def _checked(folder: Path, name: str, entry: dict[str, Any], is_hashed: bool) -> TensorFile:
    path = folder / name
    if not is_file_name(name):
        raise DataError(f"{folder / MANIFEST} names {name[:80]}, which is not a file beside it; copy the folder anew.")
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        size = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
        raise DataError(f"{path} {size}; {MANIFEST} says {entry['bytes']} bytes. Copy it anew.")
    if is_hashed and sha256_of(path) != entry["sha256"]:
        raise DataError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}. Copy it anew.")
    return open_tensors(path)


def local_shapes(layout: Layout, shapes: dict[str, torch.Size], size: int, rank: int) -> dict[str, torch.Size]:
    """Return the shape of what rank `rank` of `size` holds of every parameter of megatron-core."""

    @cache
    def meta(source: str) -> Tensor:
        return torch.empty(shapes[source], device="meta")

    return {
        name: layout.local(name, [meta(source) for source in rule.sources], size, rank).shape
        for name, rule in layout.rules.items()
    }


def require_fitting(source: str, expected: dict[str, torch.Size], found: dict[str, torch.Size]) -> None:
    """Raise DataError that names the first tensor that is missing or has another shape than config.json says."""
    wrong = {
        name: f"is {list(found[name])}, not {list(shape)}" if name in found else "is missing"
        for name, shape in expected.items()
        if found.get(name) != shape
    }
    if wrong:
        name = next(iter(wrong))
        raise DataError(
            f"model is {source}; its weights do not fit its config.json: {name} {wrong[name]} "
            f"({len(wrong)} such). Copy both from one model."
        )
