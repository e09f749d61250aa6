"""Security checks of model and tokenizer files: no custom code, kernels, external files or absurd numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaft.base.errors import DataError
from megaft.base.files import parse_json
from megaft.base.hub import find_file_if_any

FILES = (
    *("config.json", "tokenizer_config.json", "adapter_config.json"),
    *("model.safetensors.index.json", "pytorch_model.bin.index.json"),
)
_CODE_KEYS = ("auto_map", "trust_remote_code")
_KERNEL_KEY = re.compile(r"_?(attn|experts)_implementation")
_LAYERS_KEY = re.compile(r"(.*_)?(?<!per_)layers?")
MAX_LAYERS = 10_000
"""Maximum number of layers: transformers builds thousands in seconds, but a million (a damaged file) in hours."""


def require_safe_files(setting: str, source: str | Path) -> None:
    """Refuse custom code, hub kernels, external files and absurd numbers in a model's or tokenizer's JSON files.

    Call it before transformers reads the files: transformers has had vulnerabilities here (CVE-2026-4372,
    CVE-2026-5241), and prompts or warns where ranks need an error. Absurd numbers are NaN, integers beyond 64 bits,
    and more than MAX_LAYERS layers.

    Args:
        setting: Name of the user's flag, or of what is read, for the message.
        source: A folder, a hub name, or the path of a config.json.

    Raises:
        DataError: A file has such an entry; the message names it.
    """
    for path in _files(source):
        if fault := _fault(path):
            raise DataError(f"{setting} is {source}; its {path.name} {fault}")


def _files(source: str | Path) -> list[Path]:
    if Path(source).is_file():
        return [Path(source)]
    return [path for name in FILES if (path := find_file_if_any(source, name))]


def _fault(path: Path) -> str | None:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # transformers cannot read it either, and reports that
    if path.name == "adapter_config.json":
        return "describes an adapter, whose base model may be any path; merge the two and pass the merged model."
    for key, value in _pairs(content):
        if key in _CODE_KEYS and value:
            return (
                f"has {key} {json.dumps(value)}, but megaft runs no code that comes with a model; if transformers "
                "itself has the architecture, remove the entry in a copy of the model."
            )
        if _KERNEL_KEY.match(key) and _names_a_kernel(key, value):
            return f"has {key} {json.dumps(value)}, which may name code on the hub; remove it in a copy of the model."
        if key == "transformers_weights" and value:
            return f"has {key} {json.dumps(value)}, which replaces the folder's weights; remove it in a copy."
        if not (path.name.startswith("tokenizer") or key.endswith("max_length")) and _is_absurd(value):
            return f"has {key} {json.dumps(value)[:80]}, which is not a valid number for a model; copy the file again."
        if _LAYERS_KEY.fullmatch(key) and _is_above(value, MAX_LAYERS):
            return (
                f"has {key} {json.dumps(value)[:80]}; models have {MAX_LAYERS:,} layers at most; copy the file again."
            )
    if path.name.endswith(".index.json"):
        return _external_shard(content)
    return None


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every key with its value, at any depth."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield str(key), item
        yield from _pairs(item)


def _is_above(value: Any, most: int) -> bool:
    return isinstance(value, int | float) and value > most


def _is_absurd(value: Any) -> bool:
    """Return True for NaN and for integers beyond 64 bits, which only tokenizers use, for unlimited length."""
    return value != value or (isinstance(value, int) and not -(2**63) <= value < 2**63)


def _names_a_kernel(key: str, value: Any) -> bool:
    """Return True if the value may name a kernel on the hub.

    A public key may have an implementation's name, such as "sdpa", so only a value with a slash counts. Under a private
    key, which transformers does not write into files, any value counts that is not a boolean or empty.
    """
    return bool(value) and not isinstance(value, bool) and (key.startswith("_") or "/" in str(value))


def _external_shard(index: Any) -> str | None:
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    for name in weight_map.values() if isinstance(weight_map, dict) else ():
        if Path(str(name)).name != name:
            return f"names {json.dumps(name)}, which is not a file in the same folder; copy the model again."
    return None
