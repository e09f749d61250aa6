import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from prepared_files import write_dataset

from megaft.base.errors import ConfigError, DataError, LostPeerError, UserError
from megaft.base.lock import locked
from megaft.base.parallel import Topology
from megaft.config.data_source import parse_source
from megaft.config.train import DataConfig
from megaft.data.dataset import Dataset
from megaft.data.indexed import TokenFile
from megaft.data.receipt import load_receipt
from megaft.data.samples import IGNORE_INDEX, DocumentSamples, PackedSamples
from megaft.data.tokenizer import load_tokenizer
from megaft.run import main_rank, text_preparation
from megaft.run.events import recording_errors
from megaft.run.sources import (
    Sources,
    named_sources,
    notes_on_unscored,
    open_samples,
    prepare_sources,
    require_same_tokenizer,
)

MAIN = Topology("test", rank=0, local_rank=0, world_size=2, master_addr="", master_port=0)
OTHER = replace(MAIN, rank=1, local_rank=1)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(text_preparation, "POLL_SECONDS", 0.01)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat.\n\nThe dog did not.\n" * 20)
    return path


def prepare(tmp_path, toy_model, *train, topology=MAIN, **settings):
    config = DataConfig(train=tuple(map(str, train)), **settings)
    return prepare_sources(config, str(toy_model), load_tokenizer(toy_model), tmp_path / "run", topology)


def in_thread(function, *arguments, **settings):
    """Start the call elsewhere; what is returned waits for its result or its error."""
    outcome = []

    def call():
        try:
            outcome.append(function(*arguments, **settings))
        except UserError as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()

    def result():
        thread.join(timeout=300)
        assert outcome, "still waiting"
        return outcome[0]

    return result


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("books", (None, "books")),
        ("0.7,books", (0.7, "books")),
        ("3,data/a b.txt", (3.0, "data/a b.txt")),
        ("1e-3,x", (1e-3, "x")),
        ("a,b.txt", (None, "a,b.txt")),
        ("0.5,a,b.txt", (0.5, "a,b.txt")),
        (",books", (None, ",books")),
        ("./2024", (None, "./2024")),
    ],
)
def test_parse_source(named, expected):
    assert parse_source(named) == expected


@pytest.mark.parametrize("named", ["0,books", "-1,books", "nan,books", "inf,books", "0.7,", "0.7"])
def test_a_bad_pair_is_refused(named):
    with pytest.raises(ConfigError, match=rf"--data.train has '{named}'"):
        parse_source(named)


@pytest.mark.parametrize(
    ("setting", "file", "hint"),
    [("train", "a.txt", r"megaft prepare .*/corpus "), ("valid", "part.idx", r"such as .*/corpus/part\.")],
)
def test_a_folder_of_texts_is_told_of_megaft_prepare(tmp_path, text, setting, file, hint):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / file).write_text("")
    config = DataConfig(**{"train": (str(text),), setting: str(folder) if setting == "valid" else (str(folder),)})
    with pytest.raises(DataError, match=rf"--data.{setting} is .*/corpus, a folder; .*{hint}"):
        named_sources(config)


def test_several_need_a_weight_each(tmp_path, toy_model, text):
    with pytest.raises(ConfigError, match=r"--data.train is .* such as 0.7,books 0.3,wiki"):
        prepare(tmp_path, toy_model, f"0.5,{text}", text)


def test_a_text_is_tokenized_as_one_document(tmp_path, toy_model, text):
    sources = prepare(tmp_path, toy_model, text, valid=str(text))
    (train,) = sources.train
    assert sources.weights == (1.0,)
    assert sources.valid == train
    tokens = TokenFile(train.prefix)
    assert tokens.num_documents == 1
    assert load_tokenizer(toy_model).decode(tokens.read(0, tokens.num_tokens).tolist()) == text.read_text()


def test_a_text_is_prepared_once(tmp_path, toy_model, text, monkeypatch):
    first = prepare(tmp_path, toy_model, text)
    written = os.stat(f"{first.train[0].prefix}.bin").st_mtime_ns
    assert prepare(tmp_path, toy_model, text) == first
    assert os.stat(f"{first.train[0].prefix}.bin").st_mtime_ns == written
    text.write_text("Another text.")
    assert prepare(tmp_path, toy_model, text) != first


def test_the_detokenizer_is_applied(tmp_path, toy_model, text):
    text.write_text("It cost 1 @,@ 000 dollars .\n")
    (plain,) = prepare(tmp_path, toy_model, text).train
    (undone,) = prepare(tmp_path, toy_model, text, detokenizer="wikitext_megatron").train
    assert plain.prefix != undone.prefix
    tokens = TokenFile(undone.prefix)
    assert "1,000" in load_tokenizer(toy_model).decode(tokens.read(0, tokens.num_tokens).tolist())


def test_prepared_prefixes_are_taken_as_they_are(tmp_path, toy_model, text):
    (source,) = prepare(tmp_path, toy_model, text).train
    sources = prepare(tmp_path, toy_model, f"0.25,{source.prefix}", f"0.75,{text}", valid=source.prefix)
    assert sources == Sources((source, source), (0.25, 0.75), source)


@pytest.mark.parametrize("topology", [MAIN, OTHER])
def test_a_missing_file_is_named_on_every_rank(tmp_path, toy_model, topology):
    with pytest.raises(DataError, match=r"--data\.train is .*nowhere\.txt"):
        prepare(tmp_path, toy_model, tmp_path / "nowhere.txt", topology=topology)


def test_other_ranks_wait_for_the_main_one(tmp_path, toy_model, text):
    waiting = in_thread(prepare, tmp_path, toy_model, text, topology=OTHER)
    time.sleep(0.1)
    assert not (tmp_path / "run").exists(), "only the main rank writes"
    sources = prepare(tmp_path, toy_model, text)
    assert waiting() == sources


def recorded(tmp_path, *arguments, **settings):
    """Prepare on the main rank, which records its failure in the run's folder."""
    (tmp_path / "run").mkdir(exist_ok=True)
    with pytest.raises(UserError) as error, recording_errors(tmp_path / "run", is_main=True):
        prepare(tmp_path, *arguments, **settings)
    return error.value


@pytest.mark.parametrize("seconds", [5, 0.1], ids=["before it looks", "after it has looked"])
def test_other_ranks_see_the_failure(tmp_path, toy_model, text, monkeypatch, seconds):
    monkeypatch.setattr(main_rank, "MAX_SECONDS_BETWEEN_STARTS", seconds)
    text.write_bytes(b"no text: \xff\xfe\xfa")
    if seconds == 5:
        waiting = in_thread(prepare, tmp_path, toy_model, text, topology=OTHER)
    error = recorded(tmp_path, toy_model, text)
    if seconds != 5:
        os.utime(tmp_path / "run" / "ended.json", (0, 0))
        waiting = in_thread(prepare, tmp_path, toy_model, text, topology=OTHER)
    assert type(waiting()) is type(error)
    assert str(waiting()) == str(error).replace(f"{tmp_path}/", "")


def test_the_failure_of_an_earlier_run_is_not_this_runs(tmp_path, toy_model, text):
    good = text.read_text()
    text.write_bytes(b"no text: \xff\xfe\xfa")
    recorded(tmp_path, toy_model, text)
    os.utime(tmp_path / "run" / "ended.json", (0, 0))
    text.write_text(good)
    waiting = in_thread(prepare, tmp_path, toy_model, text, topology=OTHER)
    time.sleep(0.1)
    assert prepare(tmp_path, toy_model, text) == waiting()


def test_a_copy_of_the_text_in_another_place_is_the_same_text(tmp_path, toy_model, text):
    """As on the disk of another host, at another time."""
    (tmp_path / "elsewhere").mkdir()
    copies = [tmp_path / "elsewhere" / name for name in ("text.txt", "renamed.txt")]
    sources = prepare(tmp_path, toy_model, text)
    for copy in copies:
        copy.write_bytes(text.read_bytes())
        os.utime(copy, (1, 1))
        assert in_thread(prepare, tmp_path, toy_model, copy, topology=OTHER)() == sources


def test_a_rank_with_another_text_or_setting_is_refused(tmp_path, toy_model, text):
    other = tmp_path / "other.txt"
    other.write_text("Another text.")
    prepare(tmp_path, toy_model, text, valid=str(text))
    for arguments, settings, message in (
        ([other], {}, r"--data\.train is other\.txt \(13 bytes, SHA-256 \w{12}\) on rank 1, but text\.txt \(8"),
        ([text], {"valid": str(other)}, r"--data\.valid is the text file other\.txt on rank 1"),
        ([text], {"detokenizer": "ptb_megatron"}, r"--data\.detokenizer is ptb_megatron on rank 1, but identity on"),
    ):
        error = in_thread(prepare, tmp_path, toy_model, *arguments, topology=OTHER, **settings)()
        assert isinstance(error, ConfigError)
        assert re.match(message, str(error))


def edited(model, folder):
    """Copy a model's tokenizer, then edit it in place so that it gives other ids."""
    shutil.copytree(model, folder)
    yield folder
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    yield folder


def test_a_text_is_prepared_again_on_all_ranks_after_its_tokenizer_was_edited(tmp_path, toy_model, text):
    states = edited(toy_model, tmp_path / "model")
    before = prepare(tmp_path, next(states), text)
    model = next(states)
    assert isinstance(in_thread(prepare, tmp_path, model, text, topology=OTHER)(), ConfigError)
    os.remove(tmp_path / "run" / "data" / text_preparation.LIST)  # as the main rank does when it starts
    waiting = in_thread(prepare, tmp_path, model, text, topology=OTHER)
    time.sleep(0.1)
    after = prepare(tmp_path, model, text)
    assert waiting() == after
    lengths = [sources.train[0].receipt["tokens"] for sources in (before, after)]
    assert lengths[0] < lengths[1]
    require_same_tokenizer(after, load_tokenizer(model))


def test_a_rank_does_not_take_damaged_data_that_the_main_rank_prepares_again(tmp_path, toy_model, text):
    prefix = prepare(tmp_path, toy_model, text).train[0].prefix
    with open(f"{prefix}.bin", "ab") as file:
        file.write(b"x")
    waiting = in_thread(prepare, tmp_path, toy_model, text, topology=OTHER)
    time.sleep(0.1)
    assert prepare(tmp_path, toy_model, text) == waiting()
    assert waiting().train[0].receipt["documents"] == 1


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_the_main_one(tmp_path, toy_model, text, monkeypatch):
    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    with pytest.raises(LostPeerError, match="the launcher ended"):
        prepare(tmp_path, toy_model, text, topology=OTHER)


def test_a_rank_notices_that_the_main_rank_is_gone(tmp_path, toy_model, text, monkeypatch):
    """Killed without a reason, on a host whose launcher ends no other host's ranks."""
    monkeypatch.setattr(main_rank, "SECONDS_BETWEEN_LOCK_CHECKS", 0.02)
    with locked(tmp_path / "run"):
        waiting = in_thread(prepare, tmp_path, toy_model, text, topology=OTHER)
        time.sleep(0.3)
    assert isinstance(waiting(), LostPeerError)
    assert "the main rank ended" in str(waiting())


@pytest.mark.parametrize(("sample", "kind"), [("stream", PackedSamples), ("document", DocumentSamples)])
def test_open_samples(tmp_path, toy_model, text, sample, kind):
    (dataset,) = prepare(tmp_path, toy_model, text).train
    config = DataConfig(train=("unused",), context_length=16, sample=sample)
    samples = open_samples(Sources((dataset, dataset), (3.0, 1.0)), config, seed=4)
    assert [type(corpus) for corpus in samples.corpora] == [kind, kind]
    assert samples.taken(64) == [48, 16]
    assert samples[0].input_ids.dtype == np.int64
    assert samples.seed == 4


def test_attention_within_documents_is_passed_on(tmp_path, toy_model, text):
    sources = prepare(tmp_path, toy_model, text)
    config = DataConfig(train=("unused",), attend_within_documents=True)
    (corpus,) = open_samples(sources, config, seed=0).corpora
    assert isinstance(corpus, PackedSamples)
    assert corpus.attend_within_documents


@pytest.mark.parametrize("role", ["train", "valid"])
def test_data_of_another_tokenizer_is_refused(tmp_path, toy_model, text, role):
    import toy

    toy.make_tokenizer(tmp_path / "another", "An altogether different text, for different merges." * 9)
    another, own = load_tokenizer(tmp_path / "another"), load_tokenizer(toy_model)
    config = DataConfig(train=(str(text),))
    (theirs,) = prepare_sources(config, str(tmp_path / "another"), another, tmp_path / "a", MAIN).train
    ours = prepare(tmp_path, toy_model, text).train[0]
    sources = Sources((theirs,), (1.0,), ours) if role == "train" else Sources((ours,), (1.0,), theirs)
    with pytest.raises(DataError, match=f"{theirs.prefix} .*tokenizer") as error:
        require_same_tokenizer(sources, own)
    assert another.sha256[:12] in str(error.value)
    assert own.sha256[:12] in str(error.value)
    require_same_tokenizer(Sources((ours,), (1.0,)), own)
    assert load_receipt(ours.prefix)["tokenizer"]["sha256"] == own.sha256


SCORED = [[0, 0, 1, 1], [0] * 12, [0, 1]]  # the second is a prompt without an answer


@pytest.mark.parametrize(
    ("scored", "settings", "said"),
    [
        pytest.param([[0, 0, 1, 1], [0, 1]], {"sample": "document"}, [], id="all samples have some"),
        pytest.param(SCORED, {"sample": "document"}, ["b: 3 of 5 samples have no scored"], id="document"),
        pytest.param(SCORED, {}, ["b: 3 of 5 samples have no scored"], id="stream"),
        pytest.param(SCORED, {"attend_within_documents": True}, ["b: 3 of 5 samples"], id="within documents"),
    ],
)
def test_samples_that_are_left_out_are_counted(tmp_path, scored, settings, said):
    whole = write_dataset(tmp_path / "a", [[1, 2, 3]])
    prefix = write_dataset(tmp_path / "b", [[1] * len(document) for document in scored], scored)
    sources = Sources((Dataset(whole), Dataset(prefix)), (0.5, 0.5))
    samples = open_samples(sources, DataConfig(train=("a", "b"), context_length=4, **settings), seed=0)
    notes = notes_on_unscored(sources, samples)
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))
    assert all((sample.labels != IGNORE_INDEX).any() for sample in map(samples.__getitem__, range(200)))


@pytest.mark.parametrize("settings", [{}, {"sample": "document"}, {"attend_within_documents": True}])
def test_a_dataset_without_a_scored_token_is_refused_in_a_blend_too(tmp_path, settings):
    whole = write_dataset(tmp_path / "a", [[1, 2, 3]])
    empty = write_dataset(tmp_path / "empty", [[1, 2, 3], [4, 5]], [[0, 0, 0], [0, 0]])
    config = DataConfig(train=("a", "empty"), context_length=4, **settings)
    with pytest.raises(DataError, match=r"data\.train .*empty, .*scored.*role assistant"):
        open_samples(Sources((Dataset(whole), Dataset(empty)), (0.9, 0.1)), config, seed=0)
