"""Chats: scored turns, warnings about other turns, and equal rendering in preparation and generation."""

import json

import pytest
from tiny_tokenizers import CHATML, LLAMA_2, ZEPHYR, make_byte_level, make_llama_chat, make_metaspace
from transformers import AutoTokenizer

from megaft.base.errors import DataError
from megaft.commands.generate.prompts import chat_prompt, parse_messages, text_prompt
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, prepare
from megaft.data.tokenizer import load_tokenizer

TEMPLATES = {"zephyr": ZEPHYR, "chatml": CHATML, "llama 2": LLAMA_2}
DROPS_OTHERS = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat(*turns):
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


TURNS = chat("user: Hello there", "assistant: To be", "user: or not?", "assistant: Yes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    made = {"llama chat": make_llama_chat(root / "llama chat")}
    for kind, make in {"byte level": make_byte_level, "metaspace": make_metaspace}.items():
        for name, template in TEMPLATES.items():
            made[f"{kind}, {name}"] = make(root / f"{kind} {name}", bos="<s>", template=template)
    return made | {"no BOS": make_byte_level(root / "no BOS", template=DROPS_OTHERS)}


def prepared(tmp_path, tokenizer, *chats):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"m": messages}) + "\n" for messages in chats))
    return prepare(
        PrepareConfig(inputs=(str(path),), output=tmp_path / "out", tokenizer=str(tokenizer), messages_key="m")
    )


def all_tokens(prefix):
    tokens = TokenFile(prefix)
    return tokens.read(0, tokens.num_tokens).tolist()


KINDS = ["llama chat", "no BOS", *(f"{kind}, {name}" for kind in ("byte level", "metaspace") for name in TEMPLATES)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_to_answer_has_the_ids_of_transformers_and_of_preparation(tmp_path, folders, kind):
    folder = folders[kind]
    prepared(tmp_path, folder, TURNS)
    stored, scored = (all_tokens(tmp_path / name) for name in ("out", "out.scored"))
    hugging_face = AutoTokenizer.from_pretrained(folder)
    for end, begin_of_answer in ((1, 0), (3, scored.index(0, scored.index(1)))):
        prompt = chat_prompt(load_tokenizer(folder), parse_messages(json.dumps(TURNS[:end])))
        rendered = hugging_face.apply_chat_template(TURNS[:end], tokenize=True, add_generation_prompt=True)
        assert prompt.ids == rendered["input_ids"]
        assert prompt.ids == stored[: scored.index(1, begin_of_answer)]


def test_a_plain_prompt_keeps_the_beginning_of_its_tokenizer(folders, capsys):
    """The ChatML template writes no <s>, so generation warns about a rendered chat given as text."""
    tokenizer = load_tokenizer(folders["byte level, chatml"])
    assert text_prompt(tokenizer, "To be").ids == [tokenizer.bos_id, *tokenizer.encode("To be")]
    assert capsys.readouterr().err == ""
    assert tokenizer.bos_id not in chat_prompt(tokenizer, TURNS[:1]).ids
    text_prompt(tokenizer, "Hi</s>")
    assert "prompt contains </s>, like a rendered chat, and <s> is put before it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param("hello", "is not JSON", id="text"),
        pytest.param("[" * 100_000, "is not JSON", id="nested"),
        pytest.param('{"role": "user"}', "must be a list", id="object"),
        pytest.param("[]", "must be a list", id="empty"),
        pytest.param('[{"role": "user", "content": "\\ud800"}]', "surrogate", id="half a surrogate pair"),
        pytest.param('[{"role": "user", "content": "\\u0000"}]', "NUL", id="NUL"),
        pytest.param(json.dumps(TURNS), "ends with a turn of role 'assistant'", id="answered"),
        pytest.param(json.dumps(chat("gpt: a", "user: b")), "turn of role 'gpt'", id="another name"),
    ],
)
def test_messages_that_are_no_chat_to_answer_are_refused(value, message):
    with pytest.raises(DataError, match=message):
        parse_messages(value)


# Roles


@pytest.mark.parametrize("role", ["gpt", "model", "Assistant", "bot", "GPT-4", "chat_gpt", "AI"])
def test_turns_of_another_name_of_the_assistant_are_refused(tmp_path, folders, role):
    """Otherwise only the first record would train, and the second's targets would be lost silently."""
    message = rf"chats\.jsonl, line 2: 'm' has a turn of role '{role}', .*Rename it to 'assistant'"
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, folders["no BOS"], TURNS, chat("user: Hello", f"{role}: To be"))
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


@pytest.mark.parametrize("other", [1, None])
def test_turns_of_weight_0_are_read_and_not_trained_on(tmp_path, folders, other):
    """Weight 0 as in OpenAI's format: the tokens stay as context, and the other answer is scored."""
    folder = folders["byte level, chatml"]
    whole, weighted = tmp_path / "whole", tmp_path / "weighted"
    for place, first in ((whole, TURNS[1]), (weighted, TURNS[1] | {"weight": 0})):
        place.mkdir()
        prepared(place, folder, [TURNS[0], first, TURNS[2], TURNS[3] | {"weight": other}])
    assert all_tokens(whole / "out") == all_tokens(weighted / "out")
    every, last = (all_tokens(place / "out.scored") for place in (whole, weighted))
    again = every.index(0, every.index(1))  # the user's second turn
    assert last == [0] * again + every[again:]
    assert sum(last) > 0


@pytest.mark.parametrize("weight", [0.5, -1, "1"])
def test_other_weights_of_turns_are_refused(tmp_path, folders, weight):
    with pytest.raises(DataError, match=r"chats.jsonl, line 1: 'm' .*weight"):
        prepared(tmp_path, folders["byte level, chatml"], [TURNS[0], TURNS[1] | {"weight": weight}])


def test_messages_of_share_gpt_are_refused_with_the_names_to_give(tmp_path, folders):
    with pytest.raises(DataError, match=r"'from' to 'role' and 'value' to 'content', .*'gpt' to 'assistant'"):
        prepared(tmp_path, folders["no BOS"], [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "To be"}])


def test_turns_are_counted_by_role_and_unknown_ones_named(tmp_path, folders, capsys):
    others = chat("system: Short.", "narrator: Enter ghost", "user: Hello", "assistant: To be", "narrator: Exit")
    receipt = prepared(tmp_path, folders["byte level, chatml"], TURNS, others)
    assert receipt["turns"] == {"assistant": 3, "narrator": 2, "system": 1, "user": 3}
    assert capsys.readouterr().err.splitlines() == [
        "warning: turns of role 'narrator' (2) are not trained on; only those of 'assistant' are."
    ]


def test_turns_that_the_template_leaves_out_are_counted(tmp_path, folders, capsys):
    receipt = prepared(tmp_path, folders["no BOS"], chat("system: Short.", "user: Hello", "assistant: To be"), TURNS)
    assert receipt["turns"] == {"assistant": 3, "system": 1, "user": 3}
    assert capsys.readouterr().err.splitlines() == [
        "warning: the chat template leaves out or changes the content of turns of role 'system' (1)."
    ]


def test_common_roles_are_not_remarked_on(tmp_path, folders, capsys):
    roles = chat("system: a", "developer: b", "user: c", "assistant: d", "tool: e", "assistant: f")
    prepared(tmp_path, folders["byte level, chatml"], roles)
    assert capsys.readouterr().err == ""
