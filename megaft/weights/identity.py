"""Identity of a model on disk, cheap enough for every start of a run: configuration fields and a sample of the weights.

`provenance` hashes every byte instead.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from megaft.base.errors import DataError
from megaft.base.files import read_json
from megaft.weights.folder import model_folder
from megaft.weights.loading.weight_files import INDEX, shard_names
from megaft.weights.reading import file_of, folder_of
from megaft.weights.tensor_file import open_tensors

IGNORED_FIELDS = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "tokenizer_class"),
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "problem_type"),
        *("id2label", "label2id", "task_specific_params", "bos_token_id", "eos_token_id"),
    }
)
"""Fields of a transformers configuration that do not change what is trained; a model saved again may have others."""

BLOCK_BYTES = 4096
TENSOR_BLOCKS, FILE_BLOCKS = 4, 1024
"""Blocks that are hashed of each tensor in a safetensors file, and of each other file."""


def config_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a transformers configuration that the model computes with, as JSON values."""
    used = {name: value for name, value in config.items() if name not in IGNORED_FIELDS and name[:1] != "_"}
    return json.loads(json.dumps(used, default=str))


def local_config(source: str) -> dict[str, Any] | None:
    """Return `config_fields` of a model folder or config.json on disk; None if there is no readable file.

    Errors are left to loading, where a rank can report them to the others.
    """
    path = Path(source)
    try:
        config = read_json(path if path.is_file() else path / "config.json")
    except (DataError, OSError):
        return None
    return config_fields(config) if isinstance(config, dict) else None


def fingerprint_of_weights(source: str) -> str:
    """Return a fingerprint of a model's stored weights, which does not depend on where its files lie.

    It is the SHA-256 over a sample of their bytes. In safetensors files: name, dtype, shape and four blocks of 4096
    bytes, evenly spaced, of every tensor, however the tensors are distributed over files. In other files (.gguf, .bin,
    .pt): size and 1024 such blocks. So weights that differ only between the blocks have the same fingerprint, and the
    same values in another format or dtype have a different one.

    Args:
        source: A model folder, a GGUF file, the hub name of a cached model, or any folder that the backend can load.

    Raises:
        DataError: A file cannot be read.
    """
    files = _weight_files(source)
    digest = sha256()
    try:
        for tensor in sorted(_tensors(file for file in files if file.suffix == ".safetensors")):
            _update(digest, *tensor, TENSOR_BLOCKS)
        for file in (file for file in files if file.suffix != ".safetensors"):
            num_bytes = file.stat().st_size
            _update(digest, str(num_bytes), file, 0, num_bytes, FILE_BLOCKS)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}; copy it again.") from error
    return digest.hexdigest()[:32]


def _weight_files(source: str) -> list[Path]:
    """Return the weight files that a backend loads: those of the index, model.safetensors, or of another format."""
    if Path(source).is_file():
        return [Path(source)]
    if not (Path(source) / "config.json").is_file():
        source = model_folder(source)
    if index := file_of(source, INDEX):
        return [index.with_name(name) for name in sorted(shard_names(index))]
    if single := file_of(source, "model.safetensors"):
        return [single]
    folder = folder_of(source)
    patterns = (folder.glob("*.safetensors"), folder.glob("pytorch_model*.bin"), folder.rglob("*.pt"))
    return next((found for files in patterns if (found := sorted(files))), [])


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Path, int, int]]:
    """Yield name with dtype and shape, file, and byte range of every tensor."""
    for file in files:
        for name, span in open_tensors(file).spans.items():
            yield f"{name} {span.dtype} {list(span.shape)}", file, span.begin, span.end


def _update(digest: Any, name: str, file: Path, begin: int, end: int, num_blocks: int) -> None:
    """Hash the name and evenly spaced blocks of the bytes [begin, end) of a file; all of them if they are few."""
    digest.update(f"{name}\n".encode())
    last = max(begin, end - BLOCK_BYTES)
    with file.open("rb") as opened:
        for block in range(num_blocks):
            opened.seek(begin + (last - begin) * block // (num_blocks - 1))
            digest.update(opened.read(min(BLOCK_BYTES, end - begin)))
