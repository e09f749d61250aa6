import json
from itertools import pairwise

import pytest
from tiny_tokenizers import make_byte_level

from megaft.base.errors import ConfigError, DataError
from megaft.data.indexed import TokenFile
from megaft.data.prepare import PrepareConfig, ensure_prepared, prepare
from megaft.data.receipt import load_receipt
from megaft.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return str(make_byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def run(source, tmp_path):
    """run(input, ..., option=...) prepares to tmp_path/out and returns the receipt and the tokens by document."""

    def prepared(*inputs, **options):
        config = PrepareConfig(inputs=tuple(map(str, inputs)), output=tmp_path / "out", tokenizer=source, **options)
        prepare(config)
        return load_receipt(tmp_path / "out"), read(tmp_path / "out")

    return prepared


def read(prefix):
    tokens = TokenFile(prefix)
    return [tokens.read(begin, end).tolist() for begin, end in pairwise(tokens.document_offsets.tolist())]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a"])
def test_a_file_named_for_training_is_read_as_what_it_is(source, tmp_path, name):
    path = write(tmp_path / name, jsonl({"text": "To be"}, {"text": "or not"}))
    ensure_prepared(path, tmp_path / "out", source, load_tokenizer(source))
    assert read(tmp_path / "out") == [load_tokenizer(source).encode(text) for text in ("To be", "or not")]
    write(path, "text\nTo be\n")
    with pytest.raises(DataError, match=r"is a table \(\.csv\)"):
        ensure_prepared(path.rename(tmp_path / "a.csv"), tmp_path / "out", source, load_tokenizer(source))


def test_what_a_version_that_took_braces_for_text_prepared_is_prepared_again(source, tmp_path):
    path, prefix = write(tmp_path / "a.json", jsonl({"text": "To be"})), tmp_path / "out"
    prepare(PrepareConfig(inputs=(str(path),), output=prefix, tokenizer=source, format="text"))
    receipt = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps({key: value for key, value in receipt.items() if key != "format"}))
    ensure_prepared(path, prefix, source, load_tokenizer(source))
    assert read(prefix) == [load_tokenizer(source).encode("To be")]


def test_json_as_text(run, source, tmp_path):
    content = jsonl({"text": "To be"})
    receipt, found = run(write(tmp_path / "a.jsonl", content), format="text")
    assert (receipt["format"], found) == ("text", [load_tokenizer(source).encode(content)])


def test_a_folder_without_what_other_programs_left_in_it(run, tmp_path, capsys):
    for name, content in (
        ("d/part-0", jsonl({"text": "one"})),
        ("d/_SUCCESS", ""),
        ("d/part-1", ""),
        ("d/.x.crc", "x"),
    ):
        write(tmp_path / name, content)
    write(tmp_path / "d/README.md", "about")
    receipt, found = run(tmp_path / "d")
    assert (receipt["documents"], len(found)) == (2, 2)
    said = capsys.readouterr().err
    assert f"note: skipped empty files of {tmp_path}/d: {tmp_path}/d/_SUCCESS and 1 more." in said
    assert f"warning: {tmp_path}/d mixes 1 text file ({tmp_path}/d/README.md) with JSON records" in said


KEYS = [
    pytest.param({"json_key": "body"}, DataError, "has no JSON records, so the key 'body' has no effect", id="text"),
    pytest.param({"json_key": "a", "messages_key": "m"}, ConfigError, "json-key is a, .* the key m", id="two"),
    pytest.param({"json_key": "a", "format": "text"}, ConfigError, "format is text, .* the key a", id="format"),
]


@pytest.mark.parametrize(("options", "kind", "message"), KEYS)
def test_a_key_without_effect_is_an_error(run, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        run(write(tmp_path / "a.txt", "To be"), **options)


@pytest.mark.parametrize("name", ["out.json", "out.bin"])
def test_no_input_becomes_the_output(run, tmp_path, name):
    """The receipt of the prefix "out" is out.json."""
    content = '{"text": "to be"}\n'
    with pytest.raises(ConfigError, match=rf"--output .*out .*overwrite .*{name}; .*out-tokens"):
        run(write(tmp_path / name, content))
    assert (tmp_path / name).read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == [name]
