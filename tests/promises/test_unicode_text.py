"""Lone surrogates, which JSON and file names can contain: refused or escaped, never a traceback."""

import io
import json
import sys
from pathlib import Path

import pytest
import toy
from example_results import result, write_results

from evaluate_zero_shot.report import write
from megaft.base.errors import ConfigError, DataError
from megaft.base.exit_code import exit_code_of
from megaft.base.files import replacing
from megaft.commands.convert.config import ConvertConfig
from megaft.config.train import RunConfig
from megaft.data.tokenizer import load_tokenizer

HALF = "a\ud800b"
ODD_NAME = "caf\udce9"
"""A file's name in Latin 1, as Python gives it."""


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy.make_tokenizer(folder, toy.text()[:20_000])
    return folder


@pytest.fixture
def changed(tokenizer_folder, tmp_path):
    def change(**settings):
        folder = tmp_path / "changed"
        folder.mkdir()
        for path in tokenizer_folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return change


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param({"chat_template": HALF}, "'chat_template' of the tokenizer", id="chat template"),
        pytest.param(
            {"chat_template": [{"name": "default", "template": HALF}]}, "'chat_template'", id="one of several templates"
        ),
        pytest.param({"chat_template": [{"name": HALF, "template": "a"}]}, "'chat_template'", id="a template's name"),
        pytest.param({"made_by": HALF}, "'made_by' of the tokenizer", id="any setting"),
        pytest.param({HALF: 1}, r"'a\\ud800b' of the tokenizer", id="a setting's name"),
        pytest.param({"eos_token": HALF}, "UnicodeEncodeError", id="a special token"),
    ],
)
def test_a_tokenizer_that_cannot_be_saved_is_refused_when_it_is_loaded(settings, says, changed):
    folder = changed(**settings)
    with pytest.raises(DataError, match=says) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_surrogate_pairs_are_one_character(changed, tmp_path):
    folder = changed(chat_template="{{ messages[0].content }} \U0001f600")
    assert r"\ud83d\ude00" in (folder / "tokenizer_config.json").read_text()
    load_tokenizer(folder).save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi \U0001f600"


def test_a_report_shows_the_escape(tmp_path):
    pages = []
    for text in (HALF, r"a\ud800b"):
        write_results(tmp_path, [result(model_name=text, data_file=text)])
        write.write(tmp_path)
        pages.append((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    assert r"a\ud800b" in pages[0]


def test_written_texts_have_the_escape(tmp_path):
    with replacing(tmp_path / "a.md") as file:
        file.write(ODD_NAME)
    assert (tmp_path / "a.md").read_bytes() == rb"caf\udce9"


def test_printing_such_a_name_is_no_error(monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8", errors="strict"))
    assert exit_code_of(lambda: print(ODD_NAME) or 0) == 0
    assert printed.getvalue() == b"caf\\udce9\n"


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        pytest.param(lambda folder: RunConfig(dir=folder, max_steps=1), "run.dir", id="run"),
        pytest.param(lambda folder: ConvertConfig(source="a", to=folder, format="hugging-face"), "to", id="convert"),
    ],
)
def test_folders_of_weights_are_utf_8(make, setting):
    """safetensors opens no other names, and a run would fail only after its last step."""
    with pytest.raises(ConfigError, match=rf"^--{setting} is .*not UTF-8"):
        make(Path("runs") / ODD_NAME)
    make(Path("runs") / "café")
