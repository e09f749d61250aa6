"""End-of-sequence ids of generation, from a model's files."""

import json
from types import SimpleNamespace

import pytest

from megaft.base.errors import DataError
from megaft.data.end_tokens import end_ids

TOKENIZER = SimpleNamespace(eos_id=1)
DERIVED = {"_from_model_config": True}


def write(folder, generation, config):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        pytest.param({"eos_token_id": 7}, {"eos_token_id": 9}, {1, 7}, id="generation_config.json comes first"),
        pytest.param({"eos_token_id": [1, 7, 8]}, {}, {1, 7, 8}, id="a list"),
        pytest.param({"eos_token_id": []}, {"eos_token_id": 9}, {1}, id="an empty list"),
        pytest.param(None, {"eos_token_id": 9}, {1, 9}, id="config.json where there is no other"),
        pytest.param(None, {"eos_token_id": [8, 9]}, {1, 8, 9}, id="config.json's list"),
        pytest.param({"eos_token_id": None}, {"eos_token_id": 9}, {1, 9}, id="null names none"),
        pytest.param({"temperature": 0.6}, {"eos_token_id": 9}, {1, 9}, id="settings without an end token"),
        pytest.param(None, {"text_config": {"eos_token_id": [8, 9]}}, {1, 8, 9}, id="the text part of a config.json"),
        pytest.param(None, {"eos_token_id": None, "text_config": {"eos_token_id": 9}}, {1, 9}, id="null beside it"),
        pytest.param(None, {}, {1}, id="the tokenizer's where no file names one"),
        pytest.param(None, {"eos_token_id": 50256}, {1}, id="a default beyond the vocabulary never occurs"),
        pytest.param(DERIVED | {"eos_token_id": [5, 50256]}, {}, {1, 5}, id="the same, written out on saving"),
    ],
)
def test_end_ids(tmp_path, generation, config, expected):
    assert end_ids(write(tmp_path, generation, config), TOKENIZER, 600) == expected


@pytest.mark.parametrize(
    ("generation", "config", "message"),
    [
        pytest.param({"eos_token_id": "</s>"}, {}, r'eos_token_id is "</s>"', id="a text"),
        pytest.param({"eos_token_id": [1, -1]}, {}, r"eos_token_id is \[1, -1\]", id="negative"),
        pytest.param({"eos_token_id": True}, {}, "eos_token_id is true", id="a truth value"),
        pytest.param({"eos_token_id": 1.5}, {}, "eos_token_id is 1.5", id="a fraction"),
        pytest.param({"eos_token_id": [1, 600]}, {}, "0 to 599", id="beyond the vocabulary"),
        pytest.param({"eos_token_id": [[1]]}, {}, r"eos_token_id is \[\[1\]\]", id="a list in a list"),
        pytest.param({"eos_token_id": {}}, {}, "eos_token_id is {}", id="an object"),
        pytest.param(None, {"eos_token_id": -1}, "config.json: eos_token_id is -1", id="in config.json"),
        pytest.param([], {}, "generation_config.json is a JSON list", id="no object"),
        pytest.param('{"eos_token_id": ', {}, "generation_config.json is damaged", id="cut short"),
        pytest.param("[" * 100_000, {}, "generation_config.json is damaged", id="deeply nested"),
    ],
)
def test_what_is_no_id_is_refused(tmp_path, generation, config, message):
    with pytest.raises(DataError, match=message) as caught:
        end_ids(write(tmp_path, generation, config), TOKENIZER, 600)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_an_end_token_adds_none(tmp_path):
    assert end_ids(write(tmp_path, None, {}), SimpleNamespace(eos_id=None), 600) == frozenset()


def test_a_gguf_file_names_its_end_token_in_its_tokenizer():
    assert end_ids("folder/model.gguf", TOKENIZER, 600) == {1}
