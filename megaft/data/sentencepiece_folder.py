"""Tokenizer folders with a sentencepiece `tokenizer.model`: load with the files beside it, and save."""

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
"""Files that transformers reads beside a tokenizer.model."""
_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")
_ADDED = "added_tokens.json"
_ADDITIONS = (_ADDED, "chat_template.jinja", "chat_template.json", "additional_chat_templates")


def additions(folder: Path) -> list[str]:
    """Return the names of files that add to a folder's tokenizer.model."""
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
    """Load a folder's tokenizer: text as in its tokenizer.model, special tokens and settings as in transformers.

    Raises:
        DataError: A file is damaged, or the ids of a text would differ from the model's.
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
    """Return where a space is prepended: as `legacy` says if the model always prepends one, else as the model says."""
    steps: dict[str, Any] = json.loads(reference.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    own = prefix_of(model)
    return steps.get("prepend_scheme", own) if own == "always" else own


def _converted(source: Path, model: ModelProto, prefix: Prefix) -> tokenizers.Tokenizer:
    try:
        with naming_errors(source):
            return convert(model, prefix)
    except NotImplementedError as error:
        raise DataError(
            f"{source} cannot be converted for transformers ({error}); give a folder with a tokenizer.json."
        ) from error


def _add_tokens(backend: tokenizers.Tokenizer, reference: PreTrainedTokenizerFast, folder: Path) -> None:
    tokens = dict(sorted(reference.added_tokens_decoder.items()))
    for token in tokens.values():
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    declared = read_json(folder / _ADDED) if (folder / _ADDED).is_file() else {}
    for content, id_ in [*((token.content, id_) for id_, token in tokens.items()), *declared.items()]:
        if (given := backend.token_to_id(content)) != id_:
            raise DataError(
                f"{folder}: the files beside {MODEL_NAME} give {content!r} the id {id_}, but it gets {given}; give a "
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
        if prefix == "first" and text.startswith(" "):  # transformers adds no second space here
            continue
        ids, expected = backend.encode(text, add_special_tokens=False).ids, processor.encode(text)
        if ids != expected:
            raise DataError(
                f"{folder}: with {', '.join(additions(folder))} beside {MODEL_NAME}, the ids of {text!r} are "
                f"{ids}; the model's are {expected}. Give a folder with a tokenizer.json."
            )


def save(path: Path, folder: str | Path) -> None:
    """Save a bare sentencepiece model, with a tokenizer.json from which AutoTokenizer gives the same ids.

    A special token spelled in a text is ordinary text, as in sentencepiece (`split_special_tokens`).
    """
    model = parse(path.read_bytes())
    saved = _wrapped(_converted(path, model, prefix_of(model)), _special_pieces(model) | {"split_special_tokens": True})
    saved.save_pretrained(str(folder))
    if path.resolve() != Path(folder, MODEL_NAME).resolve():
        shutil.copyfile(path, Path(folder, MODEL_NAME))


def is_saved_model(folder: Path) -> bool:
    """Return True if `save` made a folder's tokenizer.json from the tokenizer.model beside it."""
    path = folder / "tokenizer_config.json"
    if not path.is_file() or not (folder / MODEL_NAME).is_file():
        return False
    try:
        settings = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # loading it raises the error
        return False
    if not isinstance(settings, dict) or settings.get("split_special_tokens") is not True:
        return False
    model = parse((folder / MODEL_NAME).read_bytes())
    saved = _wrapped(_converted(folder, model, prefix_of(model)), _special_pieces(model))
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) == parse_json(
        saved.backend_tokenizer.to_str()
    )
