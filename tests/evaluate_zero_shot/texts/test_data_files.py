import gzip
import hashlib
import json
import sys

import pytest
import zstandard

from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts.data_files import DataFile, find_data, read_text
from evaluate_zero_shot.texts.known_files import KNOWN
from evaluate_zero_shot.texts.pages import lines
from megaft.base.errors import DataError

WITH_FILES = [task for task in TASKS.values() if task.files is not None]


@pytest.fixture
def offline(tmp_path):
    """An environment without network and with an empty cache."""
    return {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}


def written(path, content="a b\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


FOUND = [
    ("wikitext103", "tokens", "wikitext103/wiki.test.tokens", "WikiText-103 test"),
    ("wikitext103", "raw", "wikitext2_raw/wiki.test.raw", "WikiText raw test"),
    ("wikitext2", "tokens", "wikitext2/wiki.test.tokens", "WikiText-2 test"),
    ("wikitext2", "raw", "wikitext2_raw/wiki.test.raw", "WikiText raw test"),
    ("ptb", "raw", "ptb/ptb.test.txt", "Penn Treebank test"),
    ("lambada-strict", "tokens", "lambada/lambada_test.jsonl", "LAMBADA test, OpenAI's copy"),
]


@pytest.fixture
def known(corpora, monkeypatch):
    """The folder of generated corpora, known by their hashes as the published ones are."""
    published = {known.name: known for known in KNOWN.values()}
    for _, _, file, name in FOUND:
        monkeypatch.setitem(KNOWN, hashlib.sha256((corpora / file).read_bytes()).hexdigest(), published[name])
    return corpora


def require_known(folder, offline, task, text, file, name):
    found = find_data(TASKS[task], text, None, {**offline, "MEGAFT_DATA": str(folder)})
    content = (folder / file).read_bytes()
    assert found == DataFile(folder / file, hashlib.sha256(content).hexdigest(), name)
    assert read_text(found, TASKS[task], None).encode() == content


@pytest.mark.parametrize(("task", "text", "file", "name"), FOUND)
def test_files_are_found_and_known(known, offline, task, text, file, name):
    require_known(known, offline, task, text, file, name)


@pytest.mark.parametrize(("task", "text", "file", "name"), FOUND)
def test_published_files_are_found_and_known(shared, offline, task, text, file, name):
    require_known(shared / "data", offline, task, text, file, name)


@pytest.mark.parametrize(
    ("file", "task", "name"),
    [
        ("wikitext2/wiki.valid.tokens", "wikitext2", "WikiText-2 validation"),
        ("wikitext2/wiki.train.tokens", "wikitext2", "WikiText-2 training"),
        ("ptb/ptb.train.txt", "ptb", "Penn Treebank training"),
        ("tinyshakespeare/input.txt", "text", None),
    ],
)
def test_a_published_file_named_is_taken_as_it_is(shared, offline, file, task, name):
    assert find_data(TASKS[task], "tokens", shared / "data" / file, offline).name == name


@pytest.mark.parametrize(
    ("file", "task", "name"),
    [
        ("wikitext2/wiki.test.tokens", "wikitext2", "WikiText-2 test"),
        ("ptb/ptb.test.txt", "text", "Penn Treebank test"),
        ("plain.txt", "text", None),
    ],
)
def test_a_file_named_is_taken_as_it_is(known, offline, file, task, name):
    assert find_data(TASKS[task], "tokens", known / file, offline).name == name


@pytest.mark.parametrize(
    ("file", "task", "message"),
    [
        (
            "wikitext2/wiki.test.tokens",
            "wikitext103",
            "is WikiText-2 test .SHA-256 [0-9a-f]{8}., .*--task wikitext103 .* use --task wikitext2 .* "
            "wiki.test.tokens from wikitext-103-v1.zip",
        ),
        ("wikitext103/wiki.test.tokens", "wikitext2", "is WikiText-103 test .* use --task wikitext103"),
        ("wikitext2_raw/wiki.test.raw", "ptb", "is WikiText raw test .* use --task wikitext2"),
        ("lambada/lambada_test.jsonl", "1bw", "is LAMBADA test, OpenAI's copy .* use --task lambada"),
    ],
)
def test_a_known_file_of_another_task_is_refused(known, offline, file, task, message):
    with pytest.raises(DataError, match=message) as caught:
        find_data(TASKS[task], "tokens", known / file, offline)
    assert caught.value.exit_code == 3


def test_the_folder_of_another_task_does_not_pass_for_this_one(known, offline):
    with pytest.raises(DataError, match="is WikiText-2 test"):
        find_data(TASKS["wikitext103"], "tokens", known / "wikitext2", offline)


def test_a_damaged_file_is_not_known(known, offline, tmp_path):
    content = (known / "ptb/ptb.test.txt").read_bytes()
    path = written(tmp_path / "ptb.test.txt", content.replace(b"statement", b"statemend", 1))
    assert find_data(TASKS["ptb"], "tokens", path, offline).name is None


def test_hashes_are_sha256_of_tasks_that_exist():
    assert all(len(sha256) == 64 and set(sha256) <= set("0123456789abcdef") for sha256 in KNOWN)
    assert {task for known in KNOWN.values() for task in known.tasks} <= set(TASKS)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("task", WITH_FILES, ids=lambda task: task.name)
def test_every_layout_is_found(tmp_path, offline, task, suffix):
    for text in ("tokens", "raw"):
        for index, name in enumerate(task.files_for(text).paths):
            content = f"{text} {index}\n".encode()
            packed = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix](content)
            path = written(tmp_path / f"{text} {index}" / f"{name}{suffix}", packed)
            found = find_data(task, text, tmp_path / f"{text} {index}", offline)
            assert found == DataFile(path, hashlib.sha256(content).hexdigest(), None)
            assert read_text(found, TASKS["text"], None).encode() == content


def test_what_is_named_comes_before_the_environment_and_the_cache(tmp_path, offline):
    for folder in ("data", "environment", "cache/megaft/data"):
        written(tmp_path / folder / "ptb/ptb.test.txt")
    inside = {**offline, "MEGAFT_DATA": str(tmp_path / "environment")}
    places = [
        find_data(TASKS["ptb"], "tokens", data, environment).path
        for data, environment in ((tmp_path / "data", inside), (None, inside), (None, offline))
    ]
    assert places == [
        tmp_path / f"{folder}/ptb/ptb.test.txt" for folder in ("data", "environment", "cache/megaft/data")
    ]


def wikitext_rows(path):
    """The rows of Salesforce/wikitext: lines, the blank ones empty."""
    return [line if line.strip() else "" for line in lines(path.read_bytes().decode())]


def lambada_rows(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "text", "file", "rows", "dataset"),
    [
        ("wikitext2", "tokens", "wikitext2/wiki.test.tokens", wikitext_rows, ("Salesforce/wikitext", "wikitext-2-v1")),
        (
            "wikitext103",
            "tokens",
            "wikitext103/wiki.test.tokens",
            wikitext_rows,
            ("Salesforce/wikitext", "wikitext-103-v1"),
        ),
        (
            "wikitext103",
            "raw",
            "wikitext2_raw/wiki.test.raw",
            wikitext_rows,
            ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        ),
        ("lambada", "tokens", "lambada/lambada_test.jsonl", lambada_rows, ("EleutherAI/lambada_openai", "default")),
    ],
)
def test_the_hubs_rows_give_the_very_file_once(known, tmp_path, offline, task, text, file, rows, dataset):
    asked = []

    def load(*name):
        asked.append(name)
        return rows(known / file)

    online = {**offline, "HF_HUB_OFFLINE": "0"}
    found = find_data(TASKS[task], text, None, online, load)
    assert found.path.is_relative_to(tmp_path / "cache")
    assert found.path.read_bytes() == (known / file).read_bytes()
    assert found.name is not None
    assert find_data(TASKS[task], text, None, offline, load) == found
    assert asked == [dataset]


def test_rows_that_changed_are_refused_and_not_kept(tmp_path, offline):
    with pytest.raises(DataError, match=r"wiki.test.tokens of SHA-256 .*--data"):
        find_data(TASKS["wikitext2"], "tokens", None, {**offline, "HF_HUB_OFFLINE": ""}, lambda *_: ["", " a \n"])
    assert not (tmp_path / "cache").exists()


def unreachable(*_):
    raise ConnectionError("Couldn't reach 'Salesforce/wikitext' on the Hub")


@pytest.mark.parametrize(
    ("task", "environment", "message"),
    [
        pytest.param(
            "wikitext103",
            {"HF_HUB_OFFLINE": "1"},
            "--task wikitext103 has no wiki.test.tokens in .*; HF_HUB_OFFLINE forbids downloading "
            "Salesforce/wikitext. Accepted paths: wikitext103/wiki.test.tokens, .* Get it from wikitext-103-v1.zip .*; "
            r"pass the file or its folder with --data, or set \$MEGAFT_DATA to the folder",
            id="offline",
        ),
        pytest.param(
            "lambada",
            {"HF_DATASETS_OFFLINE": "True"},
            "HF_DATASETS_OFFLINE forbids downloading Eleuther",
            id="datasets",
        ),
        pytest.param("wikitext2", {}, "Salesforce/wikitext could not be downloaded .Couldn't reach", id="no network"),
        pytest.param(
            "enwik8", {}, "--task enwik8 has no enwik8 in .* Get it from mattmahoney.net/dc/enwik8.zip", id="enwik8"
        ),
        pytest.param("cbt-ne", {}, "--task cbt-ne has no cbtest_NE_valid_2000ex.txt in", id="cbt"),
        pytest.param("1bw", {}, "no news.en.heldout-00000-of-00050 .* Get it from 1-billion-word", id="1bw"),
        pytest.param("text", {}, "--task text scores your own file; pass it with --data FILE", id="text"),
        pytest.param(
            "ptb", {"MEGAFT_DATA": "/no/such"}, "MEGAFT_DATA is /no/such, which is not a folder", id="MEGAFT_DATA"
        ),
    ],
)
def test_a_missing_file_is_named(tmp_path, task, environment, message):
    with pytest.raises(DataError, match=message):
        find_data(TASKS[task], "tokens", None, {"XDG_CACHE_HOME": str(tmp_path), **environment}, unreachable)


def test_a_folder_that_is_named_is_the_only_place(tmp_path):
    with pytest.raises(DataError, match=rf"--task wikitext2 has no wiki.test.raw in {tmp_path}. Accepted paths"):
        find_data(TASKS["wikitext2"], "raw", tmp_path, {}, unreachable)
    with pytest.raises(DataError, match=r"x does not exist; .*wiki.test.raw"):
        find_data(TASKS["wikitext2"], "raw", tmp_path / "x", {}, unreachable)


def test_without_the_package_datasets_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="datasets is not installed"):
        find_data(TASKS["wikitext2"], "tokens", None, {"XDG_CACHE_HOME": str(tmp_path)})
