"""Load a tokenizer with transformers' AutoTokenizer, with one-line errors for damaged files."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError

from megaft.base.errors import DataError
from megaft.base.unicode_text import is_unicode
from megaft.base.untrusted import require_safe_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(RecursionError, OverflowError, MemoryError, struct.error, StrictDataclassError),
)
"""Exceptions that transformers lets through for unexpected content: a list for an object, a missing key, ..."""


def from_pretrained(source: str | Path, **options: str) -> PreTrainedTokenizerFast:
    """Return `AutoTokenizer.from_pretrained(source)`, without running code that comes with it.

    Raises:
        DataError: The tokenizer cannot be loaded, or does not use the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    require_safe_files("the tokenizer", source)
    with naming_errors(source):
        loaded: Any = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, **options)
    if not loaded.is_fast:
        raise DataError(f"{source} has no fast tokenizer (tokenizer.json); give its sentencepiece .model file instead.")
    require_usable(source, loaded)
    return loaded


def require_usable(source: str | Path, loaded: Any) -> None:
    """Refuse a tokenizer that fails on some texts, or whose settings cannot be encoded as UTF-8.

    JSON escapes can put an unpaired surrogate into settings.
    """
    from megaft.data.probe_texts import PROBES

    with naming_errors(source):
        for text in PROBES:
            loaded.backend_tokenizer.encode(text, add_special_tokens=True)
    settings = loaded.init_kwargs | {"chat_template": loaded.chat_template}
    for name, value in settings.items():
        if not is_unicode({name: value}):
            raise DataError(
                f"{source}: {name!a} of the tokenizer has an unpaired surrogate (\\ud800 to \\udfff), which is not "
                "text; write the character itself, or remove it."
            )


@contextmanager
def naming_errors(source: str | Path) -> Iterator[None]:
    """Convert errors of transformers and tokenizers for invalid tokenizer files to a DataError."""
    try:
        yield
    except _ERRORS as error:
        raise DataError(_refusal(source, error)) from error
    except BaseException as error:
        # tokenizers raises a bare Exception for files it cannot read, and panics in cases it does not expect.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise DataError(_refusal(source, error)) from error


def _refusal(source: str | Path, error: BaseException) -> str:
    reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
    where = "" if Path(source).exists() else " There is no such folder, so it was used as a hub name."
    return (
        f"no tokenizer could be loaded from {source} ({reason}).{where} Give a folder with a tokenizer, or a hub "
        "name, with network access."
    )
