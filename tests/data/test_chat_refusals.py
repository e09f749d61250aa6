"""Chats that cannot be rendered: one-line errors with location, the template's error and a fix, in both commands."""

import json
import shutil

import pytest
from tiny_tokenizers import CHATML, GEMMA, GEMMA_4, make_byte_level

from megaft.base.errors import DataError
from megaft.commands.generate.prompts import chat_prompt, parse_messages
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, prepare
from megaft.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_byte_level(tmp_path_factory.mktemp("tokenizer") / "plain", bos="<s>")


@pytest.fixture
def with_template(plain, tmp_path):
    """with_template(jinja) returns the folder of a tokenizer with that chat template."""

    def made(template):
        folder = shutil.copytree(plain, tmp_path / "tokenizer")
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return made


def chat(*roles):
    return [{"role": role, "content": f"says {role}"} for role in roles]


def prepared(tmp_path, tokenizer, messages):
    path = tmp_path / "chats.jsonl"
    path.write_text("\n" + json.dumps({"m": messages}) + "\n")
    config = {"inputs": (str(path),), "output": tmp_path / "out", "tokenizer": str(tokenizer)}
    return prepare(PrepareConfig(**config, messages_key="m"))


REFUSED = [
    pytest.param(
        GEMMA, ("system", "user"), "\"System role not supported\" (roles: 'system', 'user')", "first", id="system"
    ),
    pytest.param(GEMMA, ("user", "user"), '"Conversation roles must alternate', "merge consecutive", id="alternation"),
    pytest.param(
        "{{ messages[0].parts.text }}",
        ("user",),
        "\"'dict object' has no attribute 'parts'\"",
        "chat model",
        id="undefined",
    ),
    pytest.param("{{ messages[0]['content'] + 1 }}", ("user",), '"can only concatenate str', "chat model", id="types"),
    pytest.param("{% for %}", ("user",), "\"Expected an expression, got 'end of statement", "chat model", id="syntax"),
    pytest.param("{{ raise_exception('a\nb') }}", ("user",), "\"a b\" (roles: 'user')", "chat model", id="two lines"),
]


@pytest.mark.parametrize(("template", "roles", "says", "way_out"), REFUSED)
def test_what_a_template_refuses_has_a_place_and_a_way_out(tmp_path, with_template, template, roles, says, way_out):
    folder = with_template(template)
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, folder, chat(*roles, "assistant"))
    with pytest.raises(DataError) as not_answered:
        chat_prompt(load_tokenizer(folder), parse_messages(json.dumps(chat(*roles))))
    for error, place in ((refused, "chats.jsonl, line 2: "), (not_answered, 'messages "[{')):
        message = str(error.value)
        assert place in message
        assert f"chat template refuses the messages: {says}" in message
        assert way_out in message.rpartition("; ")[2]
        assert "\n" not in message


def test_a_chat_that_the_assistant_begins_is_refused_where_the_template_renders_nothing_before_it(
    tmp_path, with_template
):
    fault = r'"list object has no element 0" \(no message before the assistant'
    message = rf"line 2: .*{fault}'s\); begin the chat with a user turn"
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, with_template(GEMMA), chat("assistant", "user"))


def test_a_chat_may_begin_with_the_assistant_where_the_template_lets_it(tmp_path, with_template):
    folder = with_template(CHATML)
    prepared(tmp_path, folder, chat("assistant", "user"))
    tokens, scored = (TokenFile(tmp_path / name) for name in ("out", "out.scored"))
    ids = tokens.read(0, tokens.num_tokens)[scored.read(0, tokens.num_tokens) == 1]
    assert load_tokenizer(folder).decode(ids.tolist()) == "says assistant<|im_end|>\n"


def test_a_generation_prompt_that_the_answer_does_not_begin_with_is_refused(tmp_path, with_template):
    """Gemma 4's generation prompt ends with an empty thought, which training on the answer alone would lack."""
    message = (
        r"line 2: the chat template begins an answer .* 'says assistant<turn\|>\\n' instead of '<\|channel>thought"
    )
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, with_template(GEMMA_4), chat("user", "assistant"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {}}}
FAULTS = [
    pytest.param("Hi", "is a str; give an object", id="text"),
    pytest.param({"content": "Hi"}, "has the role None; give a string", id="no role"),
    pytest.param({"role": 3, "content": "Hi"}, "has the role 3; give a string", id="role of a number"),
    pytest.param({"role": "user"}, "of role 'user', has no content; give a string", id="no content"),
    pytest.param({"role": "user", "content": 3}, "of role 'user', has the content 3; give a string", id="number"),
    pytest.param(
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        r"of role 'user', has a list as content; join the texts",
        id="parts",
    ),
    pytest.param(
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        "of role 'assistant', has tool_calls and no content; give the content \"\"",
        id="tool call",
    ),
    pytest.param({"role": "user", "content": "a\0"}, "of role 'user', has a NUL character", id="NUL"),
]


@pytest.mark.parametrize(("message", "fault"), FAULTS)
def test_a_message_that_is_none_is_named_by_its_number(tmp_path, plain, message, fault):
    messages = [*chat("user"), message]
    with pytest.raises(DataError, match=rf"chats\.jsonl, line 2: 'm', message 2, {fault}"):
        prepared(tmp_path, plain, messages)
    with pytest.raises(DataError, match=rf"the command line: 'messages', message 2, {fault}"):
        parse_messages(json.dumps(messages))


def test_a_chat_to_answer_that_the_template_does_not_keep_is_remarked_on(with_template, capsys):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    chat_prompt(load_tokenizer(with_template(template)), chat("system", "user"))
    assert capsys.readouterr().err.splitlines() == [
        "warning: the chat template leaves out or changes the content of turns of role 'system' (1)."
    ]
