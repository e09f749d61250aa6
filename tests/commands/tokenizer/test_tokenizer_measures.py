"""`megaft tokenizer check` against counts by hand."""

import json

import pytest
from tiny_tokenizers import make_byte_level

from megaft import cli
from megaft.data.tokenizer import load_tokenizer
from megaft.data.tokenizer_measures import is_single_byte

TEXT = "the cat sat on the mat\nQz the end\n"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return make_byte_level(tmp_path_factory.mktemp("byte level"))


def check(capsys, *arguments):
    assert cli.main(["tokenizer", "check", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_counts_are_those_by_hand(byte_level, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (found,) = check(capsys, byte_level, tmp_path / "a.txt").values()
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode(TEXT)
    assert (found["tokens"], found["bytes"], found["words"]) == (len(ids), len(TEXT), 9)
    assert found["bytes_per_token"] == len(TEXT) / len(ids)
    assert found["tokens_per_word"] == len(ids) / 9
    whole = [word for word in TEXT.split() if min(len(tokenizer.encode(word)), len(tokenizer.encode(f" {word}"))) == 1]
    assert found["whole_words_share"] == len(whole) / 9
    assert "the" in whole
    assert "Qz" not in whole
    assert found["unused_entries"] == tokenizer.vocab_size - len(set(ids))
    assert found["single_byte_share"] == sum(len(tokenizer.piece(id_)) == 1 for id_ in ids) / len(ids)
    assert (found["changed_texts"], found["first_mismatch"]) == (0, None)


def test_the_first_changed_place_is_shown(tmp_path, capsys):
    path = make_byte_level(tmp_path / "lower case") / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    (tmp_path / "a.jsonl").write_text('{"text": "all fine"}\n{"text": "fine Snow"}\n')
    (found,) = check(capsys, path.parent, tmp_path / "a.jsonl").values()
    where = f"{tmp_path}/a.jsonl, line 2"
    assert found["changed_texts"] == 1
    assert found["first_mismatch"] == {"where": where, "text": "Snow", "decoded": "snow"}
    assert cli.main(["tokenizer", "check", str(path.parent), str(tmp_path / "a.jsonl")]) == 0
    assert f"changes 1 text, first in {where}: 'Snow' comes back as 'snow'" in capsys.readouterr().out


def test_two_tokenizers_are_measured_on_the_same_text(byte_level, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    other = make_byte_level(tmp_path / "other", bos="<s>")
    found = check(capsys, byte_level, tmp_path / "a.txt", "--beside", other)
    assert [*found] == [str(byte_level), str(other)]
    assert {result["words"] for result in found.values()} == {9}


@pytest.mark.parametrize(
    ("piece", "expected"), [("a", True), ("Ġ", True), ("<0x0A>", True), ("ab", False), ("", False)]
)
def test_single_bytes(piece, expected):
    assert is_single_byte(piece) is expected
