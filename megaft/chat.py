"""Chats: check the messages, render them by a tokenizer's chat template, and count the turns of each role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megaft.errors import DataError
from megaft.records import Segment

if TYPE_CHECKING:
    from megaft.tokenizer import Messages

SCORED_ROLE = "assistant"
"""The role whose turns are trained on."""

PROMPT_ROLES = frozenset(
    {"system", "developer", "user", "tool", "function", "environment", "ipython", "observation", "documents", "context"}
)
"""Roles of common chat templates whose turns are only read."""

ASSISTANT_ROLES = frozenset(
    {"assistant", "gpt", "chatgpt", "gpt4", "model", "bot", "chatbot", "ai", "bing", "bard", "claude", "llama"}
    | {"response", "answer", "output", "completion"}
)
"""Names that chat datasets give the assistant; compared in lower case, without punctuation."""


class Renderer:
    """Renders chats by a tokenizer's `apply_chat_template`, and counts the turns.

    Attributes:
        turns: Messages of each role so far.
        changed: Those of which the rendered text does not hold the content as it stands, by role.
    """

    def __init__(self, apply_chat_template: Callable[..., str]) -> None:
        self.turns: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._apply_chat_template = apply_chat_template

    def __call__(self, where: str, key: str, messages: Any) -> list[Segment]:
        """Return the segments of a record's chat and count its turns.

        Raises:
            DataError: As `require_messages` and `segments`.
        """
        rendered = segments(where, require_messages(where, key, messages), self._apply_chat_template)
        text = "".join(segment.text for segment in rendered)
        self.turns.update(message["role"] for message in messages)
        self.changed.update(message["role"] for message in messages if message["content"].strip() not in text)
        return rendered

    def warnings(self) -> list[str]:
        """Return a line for each role that is not a common one, and for each whose turns the template does not keep."""
        unknown = [role for role in sorted(self.turns) if role != SCORED_ROLE and role.lower() not in PROMPT_ROLES]
        return [
            *(
                f"turns of role {role!r} ({self.turns[role]:,}) are not trained on; only those of {SCORED_ROLE!r} are."
                for role in unknown
            ),
            *(
                f"the chat template leaves out or changes the content of turns of role {role!r} ({number:,})."
                for role, number in sorted(self.changed.items())
            ),
        ]


def require_messages(where: str, key: str, messages: Any) -> Messages:
    """Return messages that have a role and a text each, and perhaps a `weight` of 0 or 1, as OpenAI's format has it.

    A weight of null, as tables have it where only some messages have a weight, counts as 1.

    Args:
        where: The file and line, or the setting.
        key: The record's key.
        messages: Its value.

    Raises:
        DataError: They have not, or a role is another name of the assistant's, whose turns would not be trained on.
    """
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise DataError(
            f"{where}: {key!r} must be a list of one or more objects with a role and a content, both strings"
            f"{_share_gpt(messages)}."
        )
    for message in messages:
        if "\0" in message["content"]:
            raise DataError(f"{where}: {key!r} has a NUL character (\\u0000), which no text has; leave it out.")
        if message.get("weight") not in (None, 0, 1):
            raise DataError(
                f"{where}: {key!r} has a turn of weight {message['weight']!r}; give 0 (not trained on) or 1."
            )
        if message["role"] != SCORED_ROLE and _is_assistant(message["role"]):
            raise DataError(
                f"{where}: {key!r} has a turn of role {message['role']!r}, which would not be trained on: only role "
                f"{SCORED_ROLE!r} is. Rename it to {SCORED_ROLE!r}."
            )
    return messages


def segments(where: str, messages: Messages, render: Callable[..., str]) -> list[Segment]:
    """Return the rendered messages; only the assistant's turns are scored, and not those of weight 0.

    Args:
        where: The file and line.
        messages: Of `require_messages`.
        render: Messages -> text, with `add_generation_prompt` up to where the assistant would speak.

    Raises:
        DataError: The template rewrites earlier turns, so that turns cannot be told apart.
    """
    found: list[Segment] = []
    done = ""
    for end, message in enumerate(messages):
        if message["role"] == SCORED_ROLE:
            prompt = render(messages[:end], add_generation_prompt=True)
            answer = render(messages[: end + 1])
            is_scored = message.get("weight") != 0
            found += [Segment(_after(where, done, prompt), False), Segment(_after(where, prompt, answer), is_scored)]
            done = answer
    rest = _after(where, done, render(messages))
    return [*found, Segment(rest, False)] if rest else found


def _after(where: str, beginning: str, text: str) -> str:
    if not text.startswith(beginning):
        raise DataError(f"{where}: the chat template rewrites earlier turns; use prompt and completion keys.")
    return text.removeprefix(beginning)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _is_assistant(role: str) -> bool:
    return "".join(filter(str.isalnum, role.lower())) in ASSISTANT_ROLES


def _share_gpt(messages: Any) -> str:
    """Return how to convert ShareGPT's messages, and nothing for others."""
    first = messages[0] if isinstance(messages, list) and messages else None
    if not isinstance(first, dict) or not {"from", "value"} <= first.keys():
        return ""
    return f"; rename from, value to role, content, and the roles human, gpt to user, {SCORED_ROLE}"
