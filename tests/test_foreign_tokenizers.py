"""Tokenizers whose files make the libraries below panic or raise: refused in one line, as any damaged file."""

import json

import pytest
from tiny_tokenizers import make_byte_level

from megaft.errors import DataError
from megaft.tokenizer import load_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


def test_a_panic_of_tokenizers_is_a_damaged_file(tmp_path):
    """A prefix longer than a merge: Rust takes a slice that ends before it begins."""
    folder = make_byte_level(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = "../../outside"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no tokenizer could be loaded from .*PanicException.*out of range"):
        load_tokenizer(folder)


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
    with pytest.raises(DataError, match=f"chat template refuses the messages: .*{says}") as error:
        tokenizer.apply_chat_template(CHAT)
    assert "\n" not in str(error.value)


def test_a_template_that_raises_nothing_gives_its_text(tmp_path):
    tokenizer = load_tokenizer(make_byte_level(tmp_path, template="{{ messages[0].content.index('i') }}"))
    assert tokenizer.apply_chat_template(CHAT) == "1"
