"""Compare a saved tokenizer, as transformers loads it, with the original."""

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
    """Refuse a folder whose tokenizer, loaded with `AutoTokenizer.from_pretrained`, differs from the given one.

    Compares the ids of `PROBES`, of every special token inside a text, and of a templated chat, with and without added
    special tokens; the special token ids; and the chat template.

    Args:
        tokenizer: The tokenizer that a model was trained with.
        folder: Saved tokenizer; a config.json in it may change the class that transformers chooses.

    Raises:
        DataError: They differ (the message has both values), or the saved one cannot be loaded.
    """
    saved = from_pretrained(folder)
    for name, id_ in tokenizer.special_ids.items():
        _require_equal(folder, f"{name}_token_id", id_, getattr(saved, f"{name}_token_id"))
    _require_equal(folder, "chat_template", tokenizer.chat_template, saved.chat_template)
    for text in _probes(tokenizer):
        for with_special_tokens in (False, True):
            what = f"ids of {text!r}" + " with special tokens around it" * with_special_tokens
            expected = tokenizer.encode_with_special_tokens(text) if with_special_tokens else tokenizer.encode(text)
            _require_equal(folder, what, expected, _ids(saved, text, with_special_tokens))


def _ids(saved: PreTrainedTokenizerBase, text: str, with_special_tokens: bool) -> list[int]:
    return list(saved(text, add_special_tokens=with_special_tokens)["input_ids"])


def _probes(tokenizer: AnyTokenizer) -> Iterator[str]:
    yield from PROBES
    for token in tokenizer.special_tokens:
        yield f"a{token}b {token} c"
    if tokenizer.chat_template is not None:
        try:
            yield tokenizer.apply_chat_template([{"role": "user", "content": "Hi  there"}], add_generation_prompt=True)
        except DataError:  # the template rejects this chat; it is compared as text above
            return


def _require_equal(folder: str | Path, what: str, expected: object, saved: object) -> None:
    if expected != saved:
        raise DataError(
            f"the tokenizer in {folder} is not the model's: {what} is {_short(saved)} in transformers, but "
            f"{_short(expected)} in megaft. transformers may choose another class from config.json's model_type; use "
            "a tokenizer made for that model type."
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
