"""Load a tokenizer by transformers' AutoTokenizer; what its files have wrong becomes one line."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from megaft.base.errors import DataError
from megaft.base.foreign import require_inert
from megaft.base.unicode_text import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(RecursionError, OverflowError, MemoryError, struct.error, StrictDataclassError),
)
"""As transformers passes on what it did not expect in a file: a list for an object, a key that is missing, ..."""


def from_pretrained(source: str | Path, **options: str) -> PreTrainedTokenizerFast:
    """Return `AutoTokenizer.from_pretrained(source)`; code that comes with it is never run.

    Raises:
        DataError: It cannot be loaded, or is not one of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    require_inert("tokenizer", source)
    with naming_errors(source):
        loaded: Any = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **options)
    if not loaded.is_fast:
        raise DataError(f"{source} has no fast tokenizer (tokenizer.json); give its sentencepiece .model file instead.")
    require_usable(source, loaded)
    return loaded


def require_usable(source: str | Path, loaded: Any) -> None:
    """Refuse a tokenizer that fails when it is used: at some texts, or at settings that UTF-8 does not have.

    Settings may have half of a surrogate pair, which JSON can escape.
    """
    from megaft.data.probe_texts import PROBES

    with naming_errors(source):
        for text in PROBES:
            loaded.backend_tokenizer.encode(text, add_special_tokens=True)
    settings = loaded.init_kwargs | {"chat_template": loaded.chat_template}
    for name, value in settings.items():
        if not is_unicode({name: value}):
            raise DataError(
                f"{source}: {name!a} of the tokenizer has half of a surrogate pair (\\ud800 to \\udfff), which is no "
                "text; write the character itself, or remove it."
            )


@contextmanager
def naming_errors(source: str | Path) -> Iterator[None]:
    """Turn the errors by which transformers and tokenizers refuse a tokenizer's files into a DataError."""
    try:
        yield
    except _ERRORS as error:
        raise DataError(_refusal(source, error)) from error
    except BaseException as error:
        # tokenizers raises the bare class for whatever it cannot read, and panics at what its authors did not expect.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(_refusal(source, error)) from error


def _refusal(source: str | Path, error: BaseException) -> str:
    reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
    where = "" if Path(source).exists() else " There is no such folder here, so it was taken for a hub name."
    return (
        f"no tokenizer could be loaded from {source} ({reason}).{where} Give a folder with a tokenizer, or a hub "
        "name where there is a network."
    )
