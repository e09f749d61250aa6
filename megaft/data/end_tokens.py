"""End-of-sequence token ids from a model's generation_config.json, config.json and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaft.base.errors import DataError
from megaft.base.files import read_json
from megaft.base.hub import find_file

if TYPE_CHECKING:
    from megaft.data.tokenizer import AnyTokenizer

KEY = "eos_token_id"


def end_ids(source: str, tokenizer: AnyTokenizer, vocab_size: int) -> frozenset[int]:
    """Return all end-of-sequence ids: the model's, as in transformers' `generate`, and the tokenizer's.

    generation_config.json takes precedence over config.json. Training puts the tokenizer's end token after every
    document, so it ends a text too. Defaults of the configuration class may lie outside a small vocabulary; they are
    ignored.

    Args:
        source: The model: a folder, a hub name, or a GGUF file, for which only the tokenizer's end token is used.
        tokenizer: The model's.
        vocab_size: Of the model.

    Raises:
        DataError: A file is damaged, or an id is invalid.
    """
    named = set() if source.endswith(".gguf") else _named(source, vocab_size)
    return frozenset(named if tokenizer.eos_id is None else named | {tokenizer.eos_id})


def _named(source: str, vocab_size: int) -> set[int]:
    path, generation = _read(source, "generation_config.json")
    if generation.get(KEY) is not None:
        is_written_by_hand = not generation.get("_from_model_config")
        return _ids(path, generation[KEY], vocab_size, is_strict=is_written_by_hand)
    path, config = _read(source, "config.json")
    text = config.get("text_config")
    nested = text.get(KEY) if isinstance(text, dict) else None
    value = nested if config.get(KEY) is None else config[KEY]
    return set() if value is None else _ids(path, value, vocab_size, is_strict=False)


def _ids(path: Path | None, value: Any, vocab_size: int, *, is_strict: bool) -> set[int]:
    ids = value if isinstance(value, list) else [value]
    for id_ in ids:
        is_id = isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0
        if not is_id or (is_strict and id_ >= vocab_size):
            raise DataError(
                f"{path}: {KEY} is {json.dumps(value)[:80]}; use a token id from 0 to {vocab_size - 1}, or a list of "
                "ids, or give --ignore-eos."
            )
    return {id_ for id_ in ids if id_ < vocab_size}


def _read(source: str, name: str) -> tuple[Path | None, dict[str, Any]]:
    """Return the path of a model's JSON file and its content; None and {} without the file."""
    path = find_file(source, name)
    if path is None:
        return None, {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is a JSON {type(content).__name__}; it must be an object. Copy it again.")
    return path, content
