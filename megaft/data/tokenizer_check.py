"""Compare a saved tokenizer, as plain transformers loads it, with the tokenizer that it was saved from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megaft.base.errors import DataError
from megaft.data.probe_texts import PROBES
from megaft.data.transformers_tokenizer import from_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megaft.data.tokenizer import AnyTokenizer


def require_same_ids(tokenizer: AnyTokenizer, folder: str | Path) -> None:
    """Refuse a folder whose tokenizer, as `AutoTokenizer.from_pretrained` loads it, is not the one given.

    Compared are the ids of `PROBES`, of every special token spelled in a text, and of a chat where there is a
    template, with and without the special tokens around a text; the ids of the special tokens; and the template.

    Args:
        tokenizer: The tokenizer that a model was trained with.
        folder: Holds a saved tokenizer, and perhaps the model's config.json, by which transformers picks a class.

    Raises:
        DataError: They differ, with the text and both lists of ids; or the folder's cannot be loaded.
    """
    saved = from_pretrained(folder)
    for name, id_ in tokenizer.special_ids.items():
        _require_equal(folder, f"{name}_token_id", id_, getattr(saved, f"{name}_token_id"))
    _require_equal(folder, "chat_template", tokenizer.chat_template, saved.chat_template)
    for text in _probes(tokenizer):
        for is_framed in (False, True):
            what = f"ids of {text!r}" + " with special tokens around it" * is_framed
            expected = tokenizer.encode_framed(text) if is_framed else tokenizer.encode(text)
            _require_equal(folder, what, expected, _ids(saved, text, is_framed))


def _ids(saved: PreTrainedTokenizerBase, text: str, is_framed: bool) -> list[int]:
    return list(saved(text, add_special_tokens=is_framed)["input_ids"])


def _probes(tokenizer: AnyTokenizer) -> Iterator[str]:
    yield from PROBES
    for token in tokenizer.special_tokens:
        yield f"a{token}b {token} c"
    if tokenizer.chat_template is not None:
        try:
            yield tokenizer.apply_chat_template([{"role": "user", "content": "Hi  there"}], add_generation_prompt=True)
        except DataError:  # a template that takes no such chat; it is compared as text above
            return


def _require_equal(folder: str | Path, what: str, expected: object, saved: object) -> None:
    if expected != saved:
        raise DataError(
            f"the tokenizer in {folder} is not the one the model has: {what} is {_short(saved)} to transformers, but "
            f"{_short(expected)} to megaft. transformers may choose another class by config.json's model_type; name a "
            "tokenizer made for that model type."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
