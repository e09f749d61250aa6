"""Receipt and report of `megaft prepare`: sources, counts, and skipped or unscored documents."""

import hashlib
import json

import pytest
from tiny_tokenizers import CHATML, make_byte_level

from megaft.base.errors import DataError
from megaft.commands.prepare import main
from megaft.data.dataset import Dataset
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, prepare
from megaft.data.receipt import load_receipt
from megaft.data.tokenizer import load_tokenizer
from megaft.run.sources import Sources, notes_on_templates


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_byte_level(tmp_path_factory.mktemp("tokenizer") / "chatml", template=CHATML)


@pytest.fixture
def run(tokenizer, tmp_path):
    """run(name, content, option=...) prepares a file to tmp_path/out by the command and returns the receipt."""

    def prepared(name, content, **options):
        path = tmp_path / name
        path.write_text(content)
        assert (
            main(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", tokenizer=str(tokenizer), **options)) == 0
        )
        return load_receipt(tmp_path / "out")

    return prepared


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def chat(*turns, **last):
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"m": [*messages[:-1], messages[-1] | last]}


QA = {"prompt_key": "q", "completion_key": "a"}
PAIRS = lines({"q": "one two", "a": " three é"}, {"q": "four", "a": "five six"})
CHATS = lines(
    chat(("system", "Be brief."), ("user", "To be or not"), ("assistant", "To be"), ("assistant", "é")),
    chat(("user", "Hi"), ("assistant", "a b c"), weight=0),
)
READ = [
    pytest.param("a.txt", "one two\n", {}, ("file", None, "text"), ("texts", 2, 8), id="text"),
    pytest.param("a.txt", "one\ntwo\n", {"unit": "line"}, ("line", None, "text"), ("texts", 2, 6), id="lines"),
    pytest.param("a.jsonl", lines({"text": "one é"}), {}, (None, "text", "lines"), ("texts", 2, 6), id="records"),
    pytest.param(
        "a.json",
        json.dumps([{"body": "one"}]),
        {"json_key": "body"},
        (None, "body", "array"),
        ("texts", 1, 3),
        id="array",
    ),
    pytest.param("a.jsonl", PAIRS, QA, (None, None, "lines"), ("completions", 4, 9 + 8), id="completions"),
    pytest.param(
        "a.jsonl",
        CHATS,
        {"messages_key": "m"},
        (None, None, "lines"),
        ("contents of scored turns", 3, 5 + 2),
        id="chats",
    ),
]


@pytest.mark.parametrize(("name", "content", "options", "read", "counted"), READ)
def test_the_receipt_says_what_was_read_and_what_was_counted(run, name, content, options, read, counted):
    """Words and bytes are counted by hand."""
    receipt = run(name, content, **options)
    assert (receipt["unit"], receipt["json_key"], receipt["sources"][0]["format"]) == read
    assert (receipt["words_and_bytes_of"], receipt["words"], receipt["bytes"]) == counted
    keys = ("prompt_key", "completion_key", "messages_key")
    assert {key: receipt[key] for key in keys} == dict.fromkeys(keys) | {
        key: value for key, value in options.items() if key in keys
    }


def test_the_receipt_has_the_hash_of_the_chat_template(run):
    """Equals sha256sum of chat_template.jinja."""
    receipt = run("a.jsonl", CHATS, messages_key="m")
    assert receipt["chat_template_sha256"] == hashlib.sha256(CHATML.encode()).hexdigest()
    assert (receipt["turns"], receipt["turns_of_weight_0"]) == ({"assistant": 3, "system": 1, "user": 2}, 1)
    assert "chat_template_sha256" not in run("a.txt", "one")


def test_chats_are_trained_with_the_template_that_rendered_them(run, tokenizer, tmp_path):
    run("a.jsonl", CHATS, messages_key="m")
    sources = Sources((), (), Dataset(str(tmp_path / "out")))
    assert notes_on_templates(sources, load_tokenizer(tokenizer)) == []
    for template, has in ((None, "has none"), (CHATML + " ", "has another")):
        other = make_byte_level(tmp_path / "other", template=template)
        (note,) = notes_on_templates(sources, load_tokenizer(other))
        assert f"tokenizer {has}" in note
        assert note.endswith("with --data.tokenizer.")


NOT_LEARNT = [
    pytest.param(
        "a.jsonl",
        CHATS + lines(chat(("user", "Hi")), chat(("system", "x"))),
        {"messages_key": "m"},
        {"documents": 4, "documents_unscored": 3, "first_unscored": "a.jsonl, line 2"},
        ["3 of 4 documents have no scored text, so the model learns nothing from them: no turn of role 'assistant'"],
        id="chats",
    ),
    pytest.param(
        "a.jsonl",
        PAIRS + lines({"q": "seven", "a": ""}),
        QA | {"append_eod": True},
        {"documents": 3, "documents_unscored": 1, "first_unscored": "a.jsonl, line 3"},
        ["1 of 3 documents have no scored text, so the model learns nothing from them: their --completion-key a is "],
        id="completions",
    ),
    pytest.param(
        "a.jsonl",
        lines({"text": "one"}, {"text": ""}, {"text": " \n"}),
        {},
        {"documents": 1, "documents_blank": 2, "first_blank": "a.jsonl, line 2", "documents_unscored": 0},
        ["2 records without text left out; the first is "],
        id="blank records",
    ),
    pytest.param(
        "a.txt",
        "\none two three four\n\nfive\nsix\n",
        {"unit": "line", "min_tokens": 4},
        {"documents": 1, "documents_skipped": 2, "first_skipped": "a.txt, line 4", "documents_unscored": 0},
        ["2 documents of fewer than 4 tokens (--min-tokens) left out; the first is "],
        id="short lines",
    ),
    pytest.param(
        "a.txt",
        "\n\nsix\n\none two three four\nfive\n",
        {"unit": "document", "min_tokens": 4},
        {"documents": 1, "documents_skipped": 1, "first_skipped": "a.txt, line 3"},
        ["1 document of fewer than 4 tokens (--min-tokens) left out; the first is "],
        id="short paragraphs",
    ),
    pytest.param(
        "a.txt", "one\n\ntwo\n", {"unit": "line"}, {"documents_unscored": 0}, [], id="blank lines are no fault"
    ),
]


@pytest.mark.parametrize(("name", "content", "options", "expected", "warnings"), NOT_LEARNT)
def test_what_is_left_out_or_not_learnt_from_is_counted_with_the_first_place(
    run, tmp_path, capsys, name, content, options, expected, warnings
):
    receipt = run(name, content, **options)
    found = {key: receipt[key] for key in expected}
    assert found == {
        key: f"{tmp_path}/{value}" if key.startswith("first") else value for key, value in expected.items()
    }
    lines = capsys.readouterr().err.splitlines()
    places = [receipt[key] for key in ("first_skipped", "first_blank", "first_unscored") if receipt[key]]
    assert len(lines) == len(warnings)
    for line, warning in zip(lines, warnings, strict=True):
        assert line.startswith(f"warning: {warning}")
        assert line.endswith(f"is {places[0]}.")


def test_the_share_of_scored_tokens_is_said(run, tmp_path, capsys):
    receipt = run("a.jsonl", CHATS, messages_key="m")
    mask = TokenFile(f"{tmp_path}/out.scored")
    scored = mask.read(0, mask.num_tokens).tolist()
    assert (receipt["scored_tokens"], receipt["scored_share"]) == (sum(scored), round(sum(scored) / len(scored), 6))
    said = f"{len(scored)} tokens, of which {sum(scored)} ({sum(scored) / len(scored):.1%}) are scored"
    assert said in capsys.readouterr().out
    run("a.txt", "one two")
    assert "are scored" not in capsys.readouterr().out


def test_what_no_template_renders_is_remarked_on(run, capsys):
    """Tool definitions beside the messages, a tool call that the template omits, and an answer without text."""
    call = {"type": "function", "function": {"name": "add_numbers", "arguments": {"a": 1}}}
    asked = chat(("user", "1 + 1"), ("assistant", ""), tool_calls=[call]) | {"tools": [{"type": "function"}]}
    receipt = run("a.jsonl", lines(asked, chat(("user", "Hi"), ("assistant", ""))) + CHATS, messages_key="m")
    assert receipt["turns_without_text"] == 1
    changed, empty, tools, _ = capsys.readouterr().err.splitlines()
    assert "leaves out or changes the content of turns of role 'assistant' (1)" in changed
    assert "turns of role 'assistant' have no text (1)" in empty
    assert "1 records define tools beside their messages" in tools
    assert "a.jsonl, line 1)" in tools


def test_a_unit_of_texts_means_nothing_in_records(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(PAIRS)
    with pytest.raises(DataError, match=r"unit is line, .*a.jsonl: .*--unit"):
        prepare(PrepareConfig(inputs=(str(path),), output=tmp_path / "out", tokenizer=str(tokenizer), unit="line"))
