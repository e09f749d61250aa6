"""Tokenizer folders with a sentencepiece `tokenizer.model`: special tokens of the files beside it, and saving."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaft.base.errors import DataError
from megaft.base.files import parse_json, read_json
from megaft.data.probe_texts import PROBES
from megaft.data.sentencepiece_model import CONTROL, UNKNOWN, ModelProto, Prefix, convert, parse, prefix_of
from megaft.data.transformers_tokenizer import from_pretrained, naming_errors

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

MODEL_NAME = "tokenizer.model"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json"),
)
"""Files beside a tokenizer.model that transformers reads for its tokenizer."""
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_ADDED = "added_tokens.json"
_ADDITIONS = (_ADDED, "chat_template.jinja", "chat_template.json", "additional_chat_templates")


def additions(folder: Path) -> list[str]:
    """Return the names of files beside a folder's tokenizer.model that say more than the model does itself."""
    pieces = _special_pieces(parse((folder / MODEL_NAME).read_bytes()))
    names = [name for name in _CONFIGS if (folder / name).is_file() and not _repeats(folder / name, pieces)]
    return names + [name for name in _ADDITIONS if (folder / name).exists()]


def _special_pieces(model: ModelProto) -> dict[str, str]:
    ids = {name: getattr(model.trainer_spec, f"{name.removesuffix('_token')}_id") for name in _SPECIAL_TOKENS}
    pieces = {name: model.pieces[id_] for name, id_ in ids.items() if 0 <= id_ < len(model.pieces)}
    return {name: piece.piece for name, piece in pieces.items() if piece.type in (UNKNOWN, CONTROL)}


def _repeats(path: Path, pieces: Mapping[str, str]) -> bool:
    settings = read_json(path)
    return isinstance(settings, dict) and all(
        pieces.get(name) == (token.get("content") if isinstance(token, dict) else token)
        for name, token in settings.items()
    )


def load(folder: Path) -> PreTrainedTokenizerFast:
    """Return a folder's tokenizer: text by its tokenizer.model, all else as transformers reads the files beside it.

    Raises:
        DataError: The files beside it are damaged, or the ids of a text would not be the model's.
    """
    reference = from_pretrained(folder)
    model = parse((folder / MODEL_NAME).read_bytes())
    prefix = _prefix(reference, model)
    backend = _converted(folder, model, prefix)
    _add_tokens(backend, reference, folder)
    backend.post_processor = reference.backend_tokenizer.post_processor
    settings = {name: getattr(reference, name) for name in (*_SPECIAL_TOKENS, "chat_template", "model_max_length")}
    loaded = _wrapped(backend, settings | {"extra_special_tokens": reference.extra_special_tokens})
    _require_model_ids(backend, model, prefix, folder)
    return loaded


def _prefix(reference: PreTrainedTokenizerFast, model: ModelProto) -> Prefix:
    """Follow `legacy`, which decides whether text after a special token gets a space; else sentencepiece itself."""
    steps: dict[str, Any] = json.loads(reference.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    own = prefix_of(model)
    return steps.get("prepend_scheme", own) if own == "always" else own


def _converted(source: Path, model: ModelProto, prefix: Prefix) -> tokenizers.Tokenizer:
    try:
        with naming_errors(source):
            return convert(model, prefix)
    except NotImplementedError as error:
        raise DataError(f"{source} cannot be converted for transformers: {error}.") from error


def _add_tokens(backend: tokenizers.Tokenizer, reference: PreTrainedTokenizerFast, folder: Path) -> None:
    tokens = dict(sorted(reference.added_tokens_decoder.items()))
    for token in tokens.values():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    declared = read_json(folder / _ADDED) if (folder / _ADDED).is_file() else {}
    for content, id_ in [*((token.content, id_) for id_, token in tokens.items()), *declared.items()]:
        if (given := backend.token_to_id(content)) != id_:
            raise DataError(
                f"{folder}: the files beside {MODEL_NAME} make {content!r} token {id_}, but it becomes {given}; give a "
                "folder with a tokenizer.json."
            )


def _wrapped(backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    given = {name: value for name, value in settings.items() if value is not None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)


def _require_model_ids(backend: tokenizers.Tokenizer, model: ModelProto, prefix: Prefix, folder: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model.SerializeToString())
    for text in PROBES:
        if prefix == "first" and text.startswith(" "):  # transformers adds no second space there
            continue
        ids, expected = backend.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ids != expected:
            raise DataError(
                f"{folder}: with what {', '.join(additions(folder))} would add to {MODEL_NAME}, the ids of {text!r} "
                f"become {ids}, not {expected} as the model has them; give a folder with a tokenizer.json."
            )


def save(path: Path, folder: str | Path) -> None:
    """Save a bare sentencepiece model as AutoTokenizer loads it with the same ids: also as a tokenizer.json.

    A special token that a text spells is text, as it is to sentencepiece (`split_special_tokens`).
    """
    model = parse(path.read_bytes())
    saved = _wrapped(_converted(path, model, prefix_of(model)), _special_pieces(model) | {"split_special_tokens": True})
    saved.save_pretrained(str(folder))
    if path.resolve() != Path(folder, MODEL_NAME).resolve():
        shutil.copyfile(path, Path(folder, MODEL_NAME))


def is_saved_model(folder: Path) -> bool:
    """Return whether a folder's tokenizer.json is only what `save` made of the tokenizer.model beside it."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / MODEL_NAME).is_file():
        return False
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # which loading it names
        return False
    if not isinstance(settings, dict) or settings.get("split_special_tokens") is not True:
        return False
    model = parse((folder / MODEL_NAME).read_bytes())
    made = _wrapped(_converted(folder, model, prefix_of(model)), _special_pieces(model))
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) == parse_json(
        made.backend_tokenizer.to_str()
    )
