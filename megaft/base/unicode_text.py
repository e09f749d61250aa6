"""Texts that UTF-8 cannot encode: lone surrogates, as from JSON escapes and odd file names."""

from __future__ import annotations

import io
import json
from typing import Any, TextIO


def is_unicode(value: Any) -> bool:
    """Return whether all texts in a JSON value, names of fields too, can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def escape_unencodable(stream: TextIO) -> None:
    """Let a stream write as escapes (\\udcff) what it cannot encode and would raise for, such as names of files."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")
