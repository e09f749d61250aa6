"""Texts that UTF-8 cannot encode: lone surrogates, as from JSON escapes and odd file names."""

from __future__ import annotations

import io
import json
from typing import Any, TextIO


def is_unicode(value: Any) -> bool:
    """Return True if all texts and keys in a JSON value can be encoded as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def escape_unencodable(stream: TextIO) -> None:
    """Make a stream write characters that it cannot encode as escapes (\\udcff) instead of raising."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")
