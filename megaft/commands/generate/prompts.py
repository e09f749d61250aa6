"""Prompts of `megaft generate`: texts, opened by the tokenizer's special tokens, and chats, opened by a template."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megaft.base.errors import DataError
from megaft.base.files import parse_json
from megaft.base.unicode_text import is_unicode
from megaft.data.chat import SCORED_ROLE, changed_roles, changed_warnings, rendered, require_messages

if TYPE_CHECKING:
    from megaft.data.tokenizer import AnyTokenizer, Messages


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text or chat to continue."""

    source: dict[str, Any]
    """The text or messages under their name, for the JSON output."""
    shown: str
    """Text printed before the continuation."""
    ids: list[int]
    num_opening: int
    """Number of special tokens in front, such as the beginning-of-sequence token."""

    @property
    def name(self) -> str:
        """Return the prompt's name for error messages."""
        (key, value), *_ = self.source.items()
        return f"{key} {str(value)[:40]!r}"


def parse_messages(value: str) -> Messages:
    """Return a chat from the JSON of --messages.

    Raises:
        DataError: It is not a list of messages, or its last message is the assistant's.
    """
    try:
        messages = parse_json(value)
    except ValueError as error:
        raise DataError(f"--messages is {value[:40]!r}, which is not JSON ({str(error)[:60]}); give a list.") from error
    if not is_unicode(messages):
        raise DataError(f"--messages is {value[:40]!r}, which escapes half of a surrogate pair; write the character.")
    require_messages("the command line", "messages", messages)
    if messages[-1]["role"] == SCORED_ROLE:
        raise DataError(f"--messages ends with a turn of role {SCORED_ROLE!r}, which the model should write; drop it.")
    return messages


def text_prompt(tokenizer: AnyTokenizer, text: str) -> Prompt:
    """Return a text's ids as in transformers, without adding opening tokens that the text already starts with.

    Raises:
        DataError: The prompt has no tokens.
    """
    opening, ids = list(tokenizer.opening_ids), tokenizer.encode(text)
    if opening and ids[: len(opening)] != opening:
        _warn_of_rendered_chat(tokenizer, text)
        ids = opening + ids
    if not ids:
        raise DataError(f"--prompt is {text!r}, which has no tokens; give a text to continue.")
    return Prompt({"prompt": text}, text, ids, len(opening))


def _warn_of_rendered_chat(tokenizer: AnyTokenizer, text: str) -> None:
    from megaft.base import parallel

    spelled = [token for token in tokenizer.special_tokens if token in text] if tokenizer.chat_template else []
    if spelled and parallel.is_main():
        print(
            f"warning: the prompt contains {spelled[0]}, like a rendered chat, and "
            f"{tokenizer.decode(tokenizer.opening_ids)} is put before it; use --chat or --messages to apply the chat "
            "template instead.",
            file=sys.stderr,
        )


def chat_prompt(tokenizer: AnyTokenizer, messages: Messages) -> Prompt:
    """Return a chat's ids up to the assistant's answer, the same as `megaft prepare` writes before an answer.

    Nothing is put before the rendered text, as in transformers' `apply_chat_template(add_generation_prompt=True)`.

    Raises:
        DataError: The tokenizer has no chat template, or it refuses the messages.
    """
    where = f"messages {str(messages)[:40]!r}"
    text = rendered(where, messages, tokenizer.apply_chat_template, add_generation_prompt=True)
    _warn_of_changes(messages, text)
    ids = tokenizer.encode(text)
    if not ids:
        raise DataError(f"{where} render to no text by the chat template; use a role that it supports.")
    opening = list(tokenizer.opening_ids)
    num_opening = len(opening) if ids[: len(opening)] == opening else 0
    return Prompt({"messages": messages}, "", ids, num_opening)


def _warn_of_changes(messages: Messages, text: str) -> None:
    from megaft.base import parallel

    if parallel.is_main():
        for warning in changed_warnings(Counter(changed_roles(messages, text))):
            print(f"warning: {warning}", file=sys.stderr)
