import json

import pytest
from tiny_tokenizers import make_byte_level

from evaluate_zero_shot.evaluation.geometry import resolve_geometry
from evaluate_zero_shot.evaluation.prepared import prepare
from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts.data_files import DataFile, read_records
from megaft.base.errors import DataError
from megaft.data.tokenizer import load_tokenizer

LINES = '{"text": "To be"}\n{"text": " \\n"}\n{"text": "or not"}\n'


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def records(path, task="text", limit_lines=None, name=None):
    return read_records(DataFile(path, "", name), TASKS[task], limit_lines)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_the_texts_are_scored_and_not_the_braces(tmp_path, name):
    path = write(tmp_path / name, LINES)
    assert records(path) == ["To be", "or not"]
    assert records(path, limit_lines=1) == ["To be"]


def test_an_array_and_a_text(tmp_path):
    assert records(write(tmp_path / "a.json", json.dumps([{"text": "To be"}]))) == ["To be"]
    assert records(write(tmp_path / "a.txt", "To be")) is None


def test_published_files_are_read_by_their_task(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    assert records(path, "lambada") is None
    assert records(path, "wikitext2", name="WikiText-2 test") is None


BAD = [
    pytest.param("text", "a.csv", "a,b\n", r"is a table \(\.csv\)", id="CSV"),
    pytest.param("text", "a.txt", b"PK\x03\x04", "is a zip archive", id="zip"),
    pytest.param("text", "a", b"PAR1\x15\0", "is a Parquet file", id="Parquet"),
    pytest.param("lambada", "a", b"PAR1\x15\0", "is a Parquet file", id="Parquet of LAMBADA"),
    pytest.param("text", "a", '{"body": "a"}\n', "line 1 has no key 'text'", id="another key"),
    pytest.param("text", "a", '{"text": " "}\n', "holds only blank texts", id="blank"),
    pytest.param("wikitext2", "a", LINES, "holds JSON records, but --task wikitext2 scores", id="another task"),
]


@pytest.mark.parametrize(("task", "name", "content", "message"), BAD)
def test_what_is_no_text(tmp_path, task, name, content, message):
    with pytest.raises(DataError, match=message):
        records(write(tmp_path / name, content), task)


@pytest.mark.parametrize("protocol", ["megaft", "megatron", "lm-eval"])
def test_each_record_is_a_document_with_its_words_and_bytes(tmp_path, protocol):
    tokenizer = load_tokenizer(make_byte_level(tmp_path / "tokenizer"))
    path = write(tmp_path / "a.jsonl", LINES)
    cut = resolve_geometry(PROTOCOLS[protocol], None, 64, 32)
    found = prepare(TASKS["text"], PROTOCOLS[protocol], DataFile(path, "", None), None, tokenizer, cut)
    is_stream = PROTOCOLS[protocol].scope == "stream"
    texts = ["To be\nor not"] if is_stream else ["To be", "or not"]
    assert found.tokens.tokens.tolist() == [id_ for text in texts for id_ in tokenizer.encode(text)]
    assert len(found.tokens.document_offsets) - 1 == len(texts)
    assert found.num_bytes == sum(map(len, texts))
    if PROTOCOLS[protocol].words == "whitespace":
        assert found.num_words == 4
