"""One line of a .jsonl file -> text, prompt and completion, or a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megaft.errors import DataError
from megaft.unicode_text import is_unicode

SCORED_ROLE = "assistant"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of text that is scored, or not: a prompt is not."""

    text: str
    is_scored: bool = True


class Record:
    """A JSON object that complains with its file and line."""

    def __init__(self, where: str, line: str) -> None:
        self._where = where
        self._line = line
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}, column {error.colno}: broken JSON ({error.msg}); a line is one object."
            ) from error
        except RecursionError as error:
            raise DataError(f"{where} nests lists or objects too deeply to be read; leave that key out.") from error
        except ValueError as error:  # Python reads no integers of more than 4,300 digits
            raise DataError(f"{where} has an integer of thousands of digits; write it as a string.") from error
        if not isinstance(fields, dict):
            raise DataError(f"{where} is a JSON {type(fields).__name__}; every line must be an object.")
        if r"\ud" in line.lower() and not is_unicode(fields):
            raise DataError(
                f"{where} escapes half of a surrogate pair (\\ud800 to \\udfff); write the character itself."
            )
        self._fields: dict[str, Any] = fields

    def text(self, key: str) -> str:
        """Return the text under a key; DataError if there is none."""
        value = self._get(key)
        if not isinstance(value, str):
            raise DataError(f"{self._where}: {key!r} is a {type(value).__name__}; it must be a string.")
        if "\0" in value:
            raise DataError(f"{self._where}: {key!r} has a NUL character (\\u0000), which no text has; leave it out.")
        return value

    def conversation(self, key: str, render: Callable[..., str]) -> list[Segment]:
        """Return the rendered messages under a key; only the assistant's turns are scored.

        Args:
            key: Holds a list of objects with a role and a content.
            render: Messages -> text, with `add_generation_prompt` up to where the assistant would speak.

        Raises:
            DataError: They are no messages, or the template rewrites earlier turns, so that turns cannot be told apart.
        """
        messages = self._get(key)
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise DataError(f"{self._where}: {key!r} must be a list of one or more objects with a role and a content.")
        segments: list[Segment] = []
        done = ""
        for end, message in enumerate(messages):
            if message["role"] == SCORED_ROLE:
                prompt = render(messages[:end], add_generation_prompt=True)
                answer = render(messages[: end + 1])
                segments += [Segment(self._after(done, prompt), False), Segment(self._after(prompt, answer))]
                done = answer
        rest = self._after(done, render(messages))
        return [*segments, Segment(rest, False)] if rest else segments

    def _get(self, key: str) -> Any:
        if key not in self._fields:
            raise DataError(f"{self._where} has no key {key!r}; its keys are {', '.join(map(repr, self._fields))}.")
        if self._line.count(json.dumps(key)) > 1:  # perhaps of another object within, or as a value
            keys = [name for name, _ in json.loads(self._line, object_pairs_hook=list)]
            if keys.count(key) > 1:
                raise DataError(f"{self._where} has the key {key!r} {keys.count(key)} times; give it once.")
        return self._fields[key]

    def _after(self, beginning: str, text: str) -> str:
        if not text.startswith(beginning):
            raise DataError(f"{self._where}: the chat template rewrites earlier turns; use prompt and completion keys.")
        return text.removeprefix(beginning)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )
