"""Every kind of bad input, through the real commands: exit code, one helpful line, no finished output."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bad_inputs_data
import bad_inputs_models
import bad_inputs_runs
import numpy as np
import pytest
from bad_inputs import Done, Toy, Workshop, start, trusted

CASES = [case for table in (bad_inputs_data, bad_inputs_models, bad_inputs_runs) for case in table.TABLE.cases]
BY_ID = {case.id: case for case in CASES}
ZERO_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}


def is_slow(case):
    """Reading texts does not import torch."""
    return case not in bad_inputs_data.TABLE.cases[:9]


@pytest.fixture(scope="module")
def sound(toy_model, toy_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    made = Toy(toy_model, folder / "sp.model", folder / "train", folder / "valid", folder / "run")
    with Workshop(folder, made) as workshop:
        for prefix, text in zip((made.train, made.valid), toy_texts, strict=True):
            workshop.prepared(prefix.name, text)
    return made


@pytest.fixture(scope="module")
def toy(sound, toy_texts):
    from sentencepiece import SentencePieceTrainer

    lines = iter(toy_texts[0].read_text().splitlines())
    prefix = sound.sentencepiece.with_suffix("")
    SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(prefix), vocab_size=300, minloglevel=2)
    with Workshop(prefix.parent, sound) as workshop:
        command = workshop.train("--checkpoint.every=2", "--run.export=none", steps=4)
        assert start(command, workshop.folder).wait().code == 0
    return sound


@pytest.fixture
def texts(tmp_path, sound):
    """A workshop for cases that need only texts."""
    with Workshop(tmp_path, sound) as workshop:
        yield workshop


@pytest.fixture
def workshop(texts, toy):
    return texts


def check_refusal(case, done, folder, before):
    print(done.out, done.err)
    assert done.code == case.code
    assert "Traceback" not in done.out + done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    for part in case.said:
        assert re.search(part, line)
    assert (done.out + done.err).count(line.removeprefix("error: ")) == 1
    left = trusted(folder)
    assert {name: left.get(name) for name in before} == before
    assert [name for name in left if name not in before and not re.fullmatch(case.leaves, name)] == []


def parameters():
    return [pytest.param(case, id=case.id, marks=[pytest.mark.slow] if is_slow(case) else []) for case in CASES]


@pytest.mark.parametrize("case", parameters())
def test_refused(case, request):
    workshop = request.getfixturevalue("workshop" if is_slow(case) else "texts")
    command = case.make(workshop)
    before = trusted(workshop.folder)
    done = start(command, workshop.folder, workshop.environment, case.before).wait()
    check_refusal(case, done, workshop.folder, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1 empty file", "56 NaN loss"])
def test_refused_by_the_installed_command(name, workshop):
    case = BY_ID[name]
    command = [str(Path(sys.executable).parent / "megaft"), *case.make(workshop)]
    before = trusted(workshop.folder)
    done = subprocess.run(command, cwd=workshop.folder, capture_output=True, text=True, timeout=300)
    check_refusal(case, Done(done.returncode, done.stdout, done.stderr), workshop.folder, before)


VALIDATED = [
    "14 no token is scored",
    *("14 zero validation windows", "16 context longer than the positions", "18 tokenizer larger than the embedding"),
    *("19 config differs from the weights", "26 batch is not micro x accumulation x ranks", "30 unknown zero key"),
    *("39 missing shard", "43 truncated safetensors", "50 .bin shorter than .idx says", "56 learning rate nan"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", VALIDATED)
def test_validate_answers_as_training_would(name, workshop):
    case = BY_ID[name]
    _, *flags = case.make(workshop)
    before = trusted(workshop.folder)
    done = start(["validate", *flags], workshop.folder).wait()
    check_refusal(case, done, workshop.folder, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["16 context longer than the positions", "28 no batch keys", "56 learning rate nan"])
def test_the_main_rank_alone_speaks(name, workshop):
    case = BY_ID[name]
    command = case.make(workshop)
    ranks = []
    workshop.rank(0, 2)
    for rank in "01":
        environment = workshop.environment | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(start(command, workshop.folder, environment))
    main = ranks[0].wait()
    other = ranks[1].kill()  # as a launcher does when a rank has ended
    check_refusal(case, main, workshop.folder, {})
    assert "error" not in other.out + other.err


def accepted(workshop, command):
    done = start(command, workshop.folder, workshop.environment).wait()
    print(done.out, done.err)
    assert done.code == 0
    assert "Traceback" not in done.out + done.err
    return done


def tokens_of(workshop, content):
    """Prepare a text; return its receipt, tokens and output."""
    done = accepted(workshop, workshop.prepare(workshop.write("a.txt", content)))
    receipt = json.loads((workshop.folder / "out/data.json").read_text())
    return receipt, np.fromfile(workshop.folder / "out/data.bin", np.uint16).tolist(), done


NOTHING = {"byte_order_marks": 0, "crlfs": 0}


@pytest.mark.parametrize(
    ("content", "mended", "said", "counted"),
    [
        pytest.param("one\ntwo", "one\ntwo", "", {}, id="3 no trailing newline"),
        pytest.param(
            "\ufeffone\n",
            "one\n",
            "begins with a byte order mark, which was removed.",
            {"byte_order_marks": 1},
            id="5 BOM",
        ),
        pytest.param(
            "one\r\ntwo\r\n",
            "one\ntwo\n",
            "has 2 CRLF line endings, which were changed to LF.",
            {"crlfs": 2},
            id="8 CRLF",
        ),
    ],
)
def test_text_that_is_mended(texts, content, mended, said, counted):
    receipt, tokens, done = tokens_of(texts, content)
    assert done.err == (f"warning: {texts.folder / 'a.txt'} {said}\n" if said else "")
    assert {name: receipt[name] for name in NOTHING} == NOTHING | counted
    assert (receipt["words"], receipt["bytes"]) == (len(mended.split()), len(mended))
    assert tokens_of(texts, mended)[1] == tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("context_length", "num_samples", "said"),
    [
        pytest.param(
            8, 5, r"data: 2 of 3 documents are longer than --data\.context-length, 8, and are cut", id="11 longer"
        ),
        pytest.param(64, 3, r"data: 0 of 3 documents are longer .* longest has 13 tokens to predict", id="12 shorter"),
    ],
)
def test_documents_of_any_length_train_whole(workshop, context_length, num_samples, said):
    text = workshop.write("a.txt", "x y\n" + "one two three four five\n" * 2)
    prefix = workshop.prepared("data", text, "--unit=line")
    num_tokens = json.loads((workshop.folder / "data.json").read_text())["tokens"]
    batch = {"train_batch_size": num_samples, "train_micro_batch_size_per_gpu": num_samples}
    flags = ["--data.sample=document", f"--data.context-length={context_length}"]
    done = accepted(workshop, workshop.train(*flags, data=prefix, deepspeed=batch, steps=1))
    assert re.search(said, done.out)
    rows = [json.loads(line) for line in (workshop.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens_seen"] == num_tokens - 3
    assert rows[-1]["tokens_per_second"] * rows[-1]["seconds"] == pytest.approx(num_tokens - 3)  # without padding


@pytest.mark.slow
def test_23_figures_by_bytes_of_a_lossy_tokenizer_are_left_out(workshop):
    model = workshop.model()
    for path in model.glob("*token*.json"):
        path.unlink()
    shutil.copyfile(workshop.toy.sentencepiece, model / "tokenizer.model")
    text = workshop.write("a.txt", "two  spaces\nand a line\n" * 40)
    done = accepted(workshop, workshop.prepare(text, tokenizer=model))
    assert "warning: the tokenizer is lossy" in done.err
    assert json.loads((workshop.folder / "out/data.json").read_text())["tokenizer"]["round_trip"] is False
    done = accepted(workshop, workshop.evaluate(text, "--context-length=64", "--stride=32", model=model))
    assert "warning: the tokenizer loses text" in done.err
    (result,) = json.loads((workshop.folder / "evaluation/results.json").read_text())["results"]
    assert result["word_perplexity"] > 1
    assert (result["num_bytes"], result["bits_per_byte"], result["byte_perplexity"]) == (None, None, None)
    accepted(workshop, workshop.train(model=model, data=text, valid=text, steps=1))
    rows = [json.loads(line) for line in (workshop.folder / "run/metrics.jsonl").read_text().splitlines()]
    validations = [row["validation"] for row in rows if "validation" in row]
    assert len(validations) == 2
    assert not any("bits_per_byte" in row for row in validations)
    assert "word_perplexity" in validations[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(
            lambda folder: (folder / "latest").unlink(),
            [r"latest is not used: it is missing; using step-00000004", r"continues from .*step-00000004"],
            id="35 missing latest",
        ),
        pytest.param(
            lambda folder: (folder / "latest").write_text("step-00000099\n"),
            [
                r"latest is not used: it names 'step-00000099'; using step-00000004 \(found: step-00000002,",
                r"continues from .*step-00000004",
            ],
            id="36 latest naming nothing",
        ),
        pytest.param(
            lambda folder: (folder / "step-00000004/rank-00000.safetensors").unlink(),
            [r"step-00000004 is not used: .*rank-00000\.safetensors is missing", r"continues from .*step-00000002"],
            id="39 missing shard, an older checkpoint",
        ),
    ],
)
def test_the_newest_checkpoint_that_holds_is_resumed(workshop, damage, said):
    damage(workshop.run())
    done = accepted(workshop, workshop.train(steps=5))
    assert all(re.search(part, done.out) for part in said)
    assert (workshop.folder / "run/checkpoints/latest").read_text() == "step-00000005\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "stage"),
    [
        pytest.param(2, {"stage": 1}, id="37 other world size"),
        pytest.param(1, ZERO_3, id="38 other ZeRO stage"),
    ],
)
def test_another_cut_resumes(workshop, world_size, stage):
    workshop.run()
    command = workshop.deepspeed(zero_optimization=stage)
    command = [*command, "--run.max-steps=5", "--run.export=none"]
    if world_size > 1:
        workshop.rank(0, world_size)
    each = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {} for rank in range(world_size)]
    ranks = [start(command, workshop.folder, workshop.environment | environment) for environment in each]
    ended = [rank.wait() for rank in ranks]
    print(ended)
    assert [done.code for done in ended] == [0] * world_size
    assert re.search("continues from .*step-00000004", ended[0].out)
    manifest = json.loads((workshop.folder / "run/checkpoints/step-00000005/manifest.json").read_text())
    assert (manifest["world_size"], manifest["zero_stage"]) == (world_size, stage["stage"])


def test_the_tables_are_whole():
    named = {int(case.id.split()[0]) for case in CASES}
    assert named | {3, 5, 8, 11, 23, 35, 36, 37, 38} == {*range(1, 57)}
