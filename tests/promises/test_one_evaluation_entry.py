"""One table entry adds a protocol, a task or a detokenizer to the evaluation."""

import json
import os
from types import SimpleNamespace

import detokenizers
import pytest

from evaluate_zero_shot.__main__ import explain, main
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol, Words
from evaluate_zero_shot.tasks import TASKS, Files, Task


@pytest.fixture
def entries(monkeypatch):
    """A protocol, a task and a detokenizer of their own, each an entry of its table."""
    shout = SimpleNamespace(SOURCE="a corpus in lower case", KNOWN_COLLISIONS=(("a", "A"),), detokenize=str.upper)
    monkeypatch.setitem(detokenizers._TABLE, "tale_shout", shout)
    protocol = Protocol(name="mine", title="Mine", source="here", detokenizer="megatron", words=Words.SPACES, note="")
    monkeypatch.setitem(PROTOCOLS, "mine", protocol)
    task = Task(
        name="tale",
        title="A tale",
        detokenizers={"megatron": "tale_shout"},
        headline="word_perplexity",
        files=Files(paths=("tale.txt",), origin="a shelf"),
        description="A short one.",
    )
    monkeypatch.setitem(TASKS, "tale", task)


def test_a_detokenizer_is_listed_and_applied(entries):
    assert detokenizers.names()[-1] == "tale_shout"
    assert detokenizers.get("tale_shout")("a b") == "A B"
    assert list(detokenizers.stream("tale_shout")(["a ", "b"])) == ["A B"]


def test_a_protocol_and_a_task_are_explained(entries, capsys):
    explain(["mine", "tale"])
    assert "len(text.split())" not in (said := capsys.readouterr().out)
    assert "text.count(' ')" in said
    assert "tale: A tale" in said


def test_a_protocol_scores_a_task(entries, toy_model, tmp_path):
    text = "once upon a time there was a model and it was small\n" * 20
    (tmp_path / "tale.txt").write_text(text)
    flags = [f"--model={toy_model}", f"--data={tmp_path}", "--context-length=32", f"--output={tmp_path / 'out'}"]
    assert main([*flags, "--task=tale", "--protocol=mine"]) == 0
    [result] = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert (result["task"], result["protocol"], result["detokenizer"]) == ("tale", "mine", "tale_shout")
    assert (result["num_words"], result["num_bytes"]) == (text.count(" "), os.path.getsize(tmp_path / "tale.txt"))
    assert "A tale" in (tmp_path / "out" / "report.md").read_text()
