"""Tokenizer files that make the underlying libraries panic or raise: one-line errors, as for any damaged file."""

import json

import pytest
from tiny_tokenizers import make_byte_level

from megaft.base.errors import DataError
from megaft.data.tokenizer import MAX_TOKEN_ID, load_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


def test_a_panic_of_tokenizers_is_a_damaged_file(tmp_path):
    """A prefix longer than a merge: Rust slices with an end before the start."""
    folder = make_byte_level(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "../../outside"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no tokenizer .*PanicException.*out of range"):
        load_tokenizer(folder)


def huge_id(folder, id_):
    """tokenizers allocates a table with that many rows."""
    path = make_byte_level(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zzz"] = id_
    path.write_text(json.dumps(content))


def huge_id_in_vocab_json(folder, id_):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(make_byte_level(folder / "whole") / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"zzz": id_}))


@pytest.mark.parametrize("make", [huge_id, huge_id_in_vocab_json])
def test_an_id_that_takes_all_memory_is_refused(make, tmp_path):
    make(tmp_path, MAX_TOKEN_ID + 1)
    with pytest.raises(DataError, match=r"'zzz' .*10000001"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [huge_id, huge_id_in_vocab_json])
def test_ids_may_have_gaps(make, tmp_path):
    make(tmp_path, 1234)
    assert load_tokenizer(tmp_path).vocab_size == 1235


def test_a_panic_at_a_text_is_a_damaged_file(tmp_path):
    """A normalizer without a type, which counts bytes as characters: only ASCII texts pass."""
    path = make_byte_level(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": [""]}))
    with pytest.raises(DataError, match=r"no tokenizer .*PanicException"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        pytest.param("{{ raise_exception('no') }}", "no", id="jinja's own"),
        pytest.param("{{ 1 // 0 }}", "integer division or modulo by zero", id="division"),
        pytest.param("{{ 'a' + 1 }}", "can only concatenate str", id="types"),
        pytest.param("{{ messages[0].content.index('x') }}", "substring not found", id="values"),
        pytest.param("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth", id="recursion"),
        pytest.param("{{ range(10 ** 9) }}", "Range too big", id="the sandbox"),
        pytest.param([{"name": "other", "template": "a"}], "no default specified", id="no default among several"),
    ],
)
def test_what_a_template_raises_is_said_in_one_line(template, says, tmp_path):
    tokenizer = load_tokenizer(make_byte_level(tmp_path, template=template))
    with pytest.raises(DataError, match=f"chat template .*: .*{says}") as error:
        tokenizer.apply_chat_template(CHAT)
    assert "\n" not in str(error.value)


def test_a_template_that_raises_nothing_gives_its_text(tmp_path):
    tokenizer = load_tokenizer(make_byte_level(tmp_path, template="{{ messages[0].content.index('i') }}"))
    assert tokenizer.apply_chat_template(CHAT) == "1"
