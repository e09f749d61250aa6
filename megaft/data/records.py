"""JSON records: parse one object and read its keys, with errors that name the file and line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megaft.base.errors import DataError
from megaft.base.files import parse_json
from megaft.base.unicode_text import is_unicode


@dataclass(frozen=True, slots=True)
class Segment:
    """A span of text that is scored, such as a completion, or not scored, such as a prompt."""

    text: str
    is_scored: bool = True


class Record:
    """A JSON object whose errors name its file and line."""

    def __init__(self, where: str, line: str) -> None:
        self.where = where
        self._line = line
        try:
            fields = parse_json(line)
        except json.JSONDecodeError as error:
            fault = f", column {error.colno}: broken JSON" if error.doc else " cannot be read as JSON"
            raise DataError(f"{where}{fault} ({error.msg}); every record must be a JSON object.") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where} is a JSON {type(fields).__name__}; every record must be a JSON object.")
        if r"\ud" in line.lower() and not is_unicode(fields):
            raise DataError(
                f"{where} has an unpaired surrogate escape (\\ud800 to \\udfff); write the character itself."
            )
        self._fields: dict[str, Any] = fields

    def text(self, key: str) -> str:
        """Return the string under a key; DataError if it is missing or not a string."""
        value = self.get(key)
        if not isinstance(value, str):
            raise DataError(f"{self.where}: {key!r} is a {type(value).__name__}; it must be a string.")
        if "\0" in value:
            raise DataError(f"{self.where}: {key!r} has a NUL character (\\u0000), which is not text; remove it.")
        return value

    def has(self, key: str) -> bool:
        """Return True if the value under a key is neither missing, null nor empty."""
        return bool(self._fields.get(key))

    def get(self, key: str) -> Any:
        """Return the value under a key; DataError if the key is missing or duplicated."""
        if key not in self._fields:
            keys = ", ".join(map(repr, self._fields))
            raise DataError(f"{self.where} has no key {key!r}; its keys are {keys}.{self._chat_hint()}")
        if self._line.count(json.dumps(key)) > 1:  # it may also be a nested key or a value
            keys = [name for name, _ in json.loads(self._line, object_pairs_hook=list)]
            if keys.count(key) > 1:
                raise DataError(f"{self.where} has the key {key!r} {keys.count(key)} times; give it once.")
        return self._fields[key]

    def _chat_hint(self) -> str:
        chats = [name for name, value in self._fields.items() if isinstance(value, list) and value]
        return f" For chats use megaft prepare --messages-key {chats[0]}." if chats else ""
