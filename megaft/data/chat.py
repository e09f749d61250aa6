"""Chats: validate messages, render them with a chat template, and count the turns of each role."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from megaft.base.errors import ChatTemplateError, DataError
from megaft.data.records import Record, Segment

if TYPE_CHECKING:
    from megaft.data.tokenizer import Messages

SCORED_ROLE = "assistant"
"""Role whose turns are trained on."""

PROMPT_ROLES = frozenset(
    {"system", "developer", "user", "tool", "function", "environment", "ipython", "observation", "documents", "context"}
)
"""Roles of common chat templates whose turns are context only."""

ASSISTANT_ROLES = frozenset(
    {"assistant", "gpt", "chatgpt", "gpt4", "model", "bot", "chatbot", "ai", "bing", "bard", "claude", "llama"}
    | {"response", "answer", "output", "completion"}
)
"""Names of the assistant in chat datasets, in lower case without punctuation; all but `assistant` are refused."""

TOOL_KEYS = ("tools", "functions")
"""Record keys for tool definitions in OpenAI's format; they are not passed to the template."""


class Renderer:
    """Renders chats with a tokenizer's `apply_chat_template` and counts the turns.

    Attributes:
        turns: Messages of each role so far.
        changed: Messages whose content, or called tool's name, is missing from the rendered text, by role.
        weight_0: Assistant turns that are not scored because their weight is 0.
        empty: Scored turns with neither text nor a tool call: only the template's end of turn is scored.
        with_tools: Records that define tools.
        first_tools: File and line of the first such record.
    """

    def __init__(self, apply_chat_template: Callable[..., str]) -> None:
        self.turns: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.weight_0 = self.empty = 0
        self.with_tools = 0
        self.first_tools: str | None = None
        self._apply_chat_template = apply_chat_template

    def __call__(self, where: str, key: str, messages: Any) -> list[Segment]:
        """Return the segments of a record's chat and count its turns.

        Raises:
            DataError: As `require_messages` and `segments`.
        """
        rendered_segments = segments(where, require_messages(where, key, messages), self._apply_chat_template)
        self.turns.update(message["role"] for message in messages)
        self.weight_0 += sum(message["role"] == SCORED_ROLE and message.get("weight") == 0 for message in messages)
        self.empty += sum(_is_scored(message) and not any(_kept_parts(message)) for message in messages)
        self.changed.update(changed_roles(messages, "".join(segment.text for segment in rendered_segments)))
        return rendered_segments

    def count_tools(self, record: Record) -> None:
        """Count the record if it defines tools."""
        if any(map(record.has, TOOL_KEYS)):
            self.with_tools += 1
            self.first_tools = self.first_tools or record.where

    def warnings(self) -> list[str]:
        """Return warnings about unknown roles, content lost by the template, empty answers, and tool definitions."""
        unknown = [role for role in sorted(self.turns) if role != SCORED_ROLE and role.lower() not in PROMPT_ROLES]
        tools = (
            f"{self.with_tools:,} records define tools beside their messages ({' or '.join(TOOL_KEYS)}; first "
            f"{self.first_tools}), which are not rendered; put them in a system turn."
        )
        empty = f"turns of role {SCORED_ROLE!r} have no text ({self.empty:,}); only their end of turn is trained on."
        return [
            *(
                f"turns of role {role!r} ({self.turns[role]:,}) are not trained on; only those of {SCORED_ROLE!r} are."
                for role in unknown
            ),
            *changed_warnings(self.changed),
            *([empty] if self.empty else []),
            *([tools] if self.with_tools else []),
        ]


def changed_roles(messages: Messages, text: str) -> list[str]:
    """Return the role of each message whose content, or the name of a tool it calls, is not in the rendered text."""
    return [message["role"] for message in messages if not all(part in text for part in _kept_parts(message))]


def changed_warnings(changed: Counter[str]) -> list[str]:
    """Return a warning for each role whose content the template leaves out or changes."""
    return [
        f"the chat template leaves out or changes the content of turns of role {role!r} ({number:,})."
        for role, number in sorted(changed.items())
    ]


def _kept_parts(message: dict[str, Any]) -> list[str]:
    calls = message.get("tool_calls")
    functions = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return [message["content"].strip(), *(name for name in names if isinstance(name, str))]


def template_sha256(template: Any) -> str:
    """Return the SHA-256 of a chat template, as of chat_template.jinja; for several templates, of their JSON."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return sha256(text.encode()).hexdigest()


def require_messages(where: str, key: str, messages: Any) -> Messages:
    """Return valid messages: a role and a content each, and an optional `weight` of 0 or 1, as in OpenAI's format.

    A weight of null, as in tables where only some messages have a weight, counts as 1.

    Args:
        where: The file and line, or the setting.
        key: The record's key.
        messages: Its value.

    Raises:
        DataError: A message is invalid, or its role is another name of the assistant, which would not be trained on.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: {key!r} must be a list of one or more objects with a role and a content, both strings."
        )
    for number, message in enumerate(messages, 1):
        if fault := _fault(message):
            raise DataError(f"{where}: {key!r}, message {number}, {fault}.")
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


def _fault(message: Any) -> str | None:
    """Return a message's fault and its fix, or None. A valid message has a role and a content, both strings."""
    if not isinstance(message, dict):
        return f"is a {type(message).__name__}; give an object with a role and a content"
    if "role" not in message and {"from", "value"} <= message.keys():  # ShareGPT's form
        return (
            f"has ShareGPT's keys; rename 'from' to 'role' and 'value' to 'content', "
            f"and the role 'human' to 'user' and 'gpt' to {SCORED_ROLE!r}"
        )
    if not isinstance(message.get("role"), str):
        return f"has the role {message.get('role')!r}; give a string, such as 'user'"
    content, role = message.get("content"), message["role"]
    if isinstance(content, list):
        return f"of role {role!r}, has a list as content; join the texts of its parts into one string"
    if content is None and message.get("tool_calls"):
        return f'of role {role!r}, has tool_calls and no content; give the content ""'
    if content is None:
        return f"of role {role!r}, has no content; give a string"
    if not isinstance(content, str):
        return f"of role {role!r}, has the content {content!r:.40}; give a string"
    if "\0" in content:
        return f"of role {role!r}, has a NUL character (\\u0000), which is not text; remove it"
    return None


def scored_contents(messages: Messages) -> list[str]:
    """Return the content of each scored turn."""
    return [message["content"] for message in messages if _is_scored(message)]


def _is_scored(message: dict[str, Any]) -> bool:
    return message["role"] == SCORED_ROLE and message.get("weight") != 0


def segments(where: str, messages: Messages, render: Callable[..., str]) -> list[Segment]:
    """Render messages to segments; only the assistant's turns are scored, except those of weight 0.

    Args:
        where: The file and line.
        messages: Validated by `require_messages`.
        render: Messages -> text; with `add_generation_prompt`, up to where the assistant's turn begins.

    Raises:
        DataError: The template refuses the messages, or rewrites earlier turns, so that turns cannot be separated.
    """
    result: list[Segment] = []
    done = ""
    for end, message in enumerate(messages):
        if message["role"] == SCORED_ROLE:
            prompt = rendered(where, messages[:end], render, add_generation_prompt=True)
            begin = _after(where, done, prompt, "rewrites earlier turns")
            done = rendered(where, messages[: end + 1], render)
            answer = _after(where, prompt, done, "begins an answer differently from its generation prompt")
            result += [Segment(begin, False), Segment(answer, _is_scored(message))]
    rest = _after(where, done, rendered(where, messages, render), "rewrites earlier turns")
    return [*result, Segment(rest, False)] if rest else result


def rendered(where: str, messages: Messages, render: Callable[..., str], *, add_generation_prompt: bool = False) -> str:
    """Render messages to text with a chat template.

    Raises:
        DataError: The template refuses them; the message has their location and roles, the template's error and a fix.
    """
    try:
        return render(messages, add_generation_prompt=add_generation_prompt)
    except ChatTemplateError as error:
        roles = ", ".join(f"{message['role']!r:.40}" for message in messages[:8]) + ", ..." * (len(messages) > 8)
        raise DataError(f"{where}: {error} ({_named(roles)}); {_fix(roles, error)}.") from error


def _named(roles: str) -> str:
    return f"roles: {roles}" if roles else "no message before the assistant's"


def _fix(roles: str, error: ChatTemplateError) -> str:
    reason = str(error).lower()
    if not roles:
        return f"begin the chat with a user turn, not one of role {SCORED_ROLE!r}"
    if "alternat" in reason:
        return "begin with a user turn, and merge consecutive turns of the same role"
    if "system" in reason and "system" in roles:
        return "move the system turn's content to the start of the first user turn"
    return "give messages that it accepts, another chat model's tokenizer, or prompts and completions instead of chats"


def _after(where: str, beginning: str, text: str, fault: str) -> str:
    if not text.startswith(beginning):
        at = next(
            (at for at, (left, right) in enumerate(zip(beginning, text, strict=False)) if left != right), len(text)
        )
        raise DataError(
            f"{where}: the chat template {fault}, {text[at : at + 40]!r} instead of {beginning[at : at + 40]!r}; "
            "use prompt and completion keys, with the prompt exactly as in generation."
        )
    return text.removeprefix(beginning)


def _is_assistant(role: str) -> bool:
    return "".join(filter(str.isalnum, role.lower())) in ASSISTANT_ROLES
