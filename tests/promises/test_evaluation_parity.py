"""Results of `python -m evaluate_zero_shot` compared with brute force and lm-evaluation-harness, on trained weights."""

import json
import math
import shutil
from itertools import islice
from pathlib import Path

import detokenizers
import pytest
import read_once
import references
import smollm2 as smol
from references import Reference
from tiny_models import change_tensors

from evaluate_zero_shot.__main__ import main
from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.texts.lambada import STOP_WORDS

pytestmark = pytest.mark.slow

TOLERANCE = 1e-6
slow = pytest.mark.slow
MAX_CHARACTERS = 20_000
"""Characters of a text that is a single line."""
FILES = {
    "wikitext103": "wikitext103/wiki.test.tokens",
    "wikitext2": "wikitext2/wiki.test.tokens",
    "raw": "wikitext2_raw/wiki.test.raw",
    "ptb": "ptb/ptb.test.txt",
    "lambada": "lambada/lambada_test.jsonl",
    "1bw": "1bw/news.en.heldout-00000-of-00050",
    "text8": "text8/text8",
    "cbt-cn": "cbt/cbtest_CN_valid_2000ex.txt",
}


@pytest.fixture(scope="module")
def tiny(trained_gpt2):
    return Reference(trained_gpt2)


@pytest.fixture(scope="module")
def beginning(corpora, tmp_path_factory):
    """beginning("ptb", 40) is a file of the first 40 lines of a corpus, and their text."""
    folder = tmp_path_factory.mktemp("data")

    def cut(corpus, num_lines):
        with (corpora / FILES[corpus]).open(encoding="utf-8", newline="\n") as lines:
            text = "".join(islice(lines, num_lines))[:MAX_CHARACTERS]
        path = folder / f"{num_lines}_{Path(FILES[corpus]).name}"
        path.write_text(text, encoding="utf-8", newline="\n")
        return path, text

    return cut


@pytest.fixture(scope="module")
def short_pages(corpora, tmp_path_factory):
    """short_pages("raw", 3) is a file of a corpus's three shortest articles of 800 words or more, and the articles."""
    folder = tmp_path_factory.mktemp("pages")

    def cut(corpus, num_pages, fewest_words=800):
        text = (corpora / FILES[corpus]).read_text(encoding="utf-8")
        articles = [page for page in references.pages(text) if len(page.split()) >= fewest_words]
        longest = sorted(map(len, articles))[num_pages - 1]
        articles = [page for page in articles if len(page) <= longest]
        path = folder / f"{num_pages}_{Path(FILES[corpus]).name}"
        path.write_text("".join(articles), encoding="utf-8", newline="\n")
        return path, articles

    return cut


@pytest.fixture(scope="module", autouse=True)
def models_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        read_once.models(patch)
        yield


@pytest.fixture
def evaluate_all(tmp_path):
    """evaluate_all(model, flag, ...) runs the command and returns its results by task."""

    def run(model, *flags):
        assert main([f"--model={model}", f"--output={tmp_path}", *flags]) == 0
        return {row["task"]: row for row in json.loads((tmp_path / "results.json").read_text())["results"]}

    return run


@pytest.fixture
def evaluate(evaluate_all):
    """evaluate(model, flag, ...) runs the command and returns its only result."""

    def run(model, *flags):
        (result,) = evaluate_all(model, *flags).values()
        return result

    return run


def flags(task, protocol, path, context_length=None, stride=None):
    chosen = {"task": task, "protocol": protocol, "data": path, "context-length": context_length, "stride": stride}
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def require_equal(result, reference):
    assert {name: result[name] for name in reference} == pytest.approx(reference, rel=TOLERANCE)


WINDOWS = [
    pytest.param("wikitext103", 128, 32, 14, id="overlap"),
    pytest.param("wikitext103", 128, 128, 14, id="no overlap"),
    pytest.param("wikitext103", 1024, 32, 50, id="the paper's"),
    pytest.param("wikitext103", 1024, 1024, 50, id="1024 by 1024"),
    pytest.param("wikitext103", 1024, 32, 14, id="shorter than a window"),
    pytest.param("wikitext2", 128, 32, 14, id="wikitext2"),
]
"""Corpus, context length, stride, lines."""


@pytest.mark.parametrize(("corpus", "context_length", "stride", "num_lines"), WINDOWS)
def test_megatron(tiny, trained_gpt2, beginning, evaluate, corpus, context_length, stride, num_lines):
    path, text = beginning(corpus, num_lines)
    result = evaluate(trained_gpt2, *flags(corpus, "megatron", path, context_length, stride))
    require_equal(result, references.megatron(tiny, text, context_length, stride))


def as_loaded(pages):
    """The harness's dataset joins lines without the newline that stands before the next title."""
    return [*(page.removesuffix("\n") for page in pages[:-1]), pages[-1]]


@pytest.mark.parametrize("context_length", [64, 1024])
def test_lm_eval(tiny, trained_gpt2, short_pages, evaluate, context_length):
    path, pages = short_pages("raw", 2)
    result = evaluate(trained_gpt2, *flags("wikitext2", "lm-eval", path, context_length))
    require_equal(result, references.lm_eval(tiny, as_loaded(pages), context_length))
    assert result["num_documents"] == 2


@slow
def test_olmo(tiny, trained_gpt2, short_pages, evaluate):
    path, pages = short_pages("wikitext2", 2)
    result = evaluate(trained_gpt2, *flags("wikitext2", "olmo", path, 256))
    require_equal(result, references.lm_eval(tiny, as_loaded(pages), 256, detokenize=str))


@pytest.mark.parametrize(
    ("context_length", "stride"),
    [(128, 64), (128, 128), (1024, 512)],
)
def test_megaft(tiny, trained_gpt2, short_pages, evaluate, context_length, stride):
    path, pages = short_pages("wikitext103", 2)
    result = evaluate(trained_gpt2, *flags("wikitext103", "megaft", path, context_length, stride))
    require_equal(result, references.megaft(tiny, pages, detokenizers.get("wikitext"), context_length, stride))
    assert result["num_documents"] == 2


@pytest.mark.parametrize(("task", "num_lines"), [("ptb", 30), ("text8", 1), ("1bw", 20)])
def test_megaft_on_other_corpora(tiny, trained_gpt2, beginning, evaluate, task, num_lines):
    path, text = beginning(task, num_lines)
    result = evaluate(trained_gpt2, *flags(task, "megaft", path, 256))
    documents = text.splitlines(keepends=True) if task == "1bw" else [text]
    require_equal(result, references.megaft(tiny, documents, detokenizers.get(task), 256, 128))


@pytest.mark.parametrize(
    ("context_length", "stride"),
    [(128, 32), (128, 128), (1024, 512)],
)
def test_hf_docs(tiny, trained_gpt2, beginning, evaluate, context_length, stride):
    path, text = beginning("raw", 50 if context_length == 1024 else 14)
    result = evaluate(trained_gpt2, *flags("wikitext2", "hf-docs", path, context_length, stride))
    require_equal(result, references.hf_docs(tiny, references.rows_joined(text), context_length, stride))


@pytest.mark.parametrize(
    ("tokens_per_sample", "context_window"),
    [(128, 96), (128, 0), (512, 400)],
)
def test_fairseq(tiny, trained_gpt2, beginning, evaluate, tokens_per_sample, context_window):
    path, text = beginning("wikitext103", 50 if tokens_per_sample == 512 else 14)
    block = tokens_per_sample - context_window
    result = evaluate(trained_gpt2, *flags("wikitext103", "fairseq", path, tokens_per_sample, block))
    require_equal(result, references.fairseq(tiny, text, tokens_per_sample, context_window))


@slow
def test_in_context_ralm(tiny, trained_gpt2, beginning, evaluate):
    path, text = beginning("wikitext103", 8)
    result = evaluate(trained_gpt2, *flags("wikitext103", "ralm", path, 128))
    require_equal(result, references.ralm(tiny, text, 128, 4))


@pytest.mark.parametrize("context_length", [255, 1024])
def test_lm_finetuning(tiny, trained_gpt2, beginning, evaluate, context_length):
    path, text = beginning("wikitext2", 50)
    result = evaluate(trained_gpt2, *flags("wikitext2", "lm-finetuning", path, context_length))
    require_equal(result, references.lm_finetuning(tiny, text, context_length))


@pytest.fixture(scope="module")
def uniform(trained_gpt2, tmp_path_factory):
    """Folder of a model that gives all 2,001 tokens equal probability: its tied embeddings are zero."""
    folder = shutil.copytree(trained_gpt2, tmp_path_factory.mktemp("models") / "uniform")
    change_tensors(folder, lambda tensors: tensors["transformer.wte.weight"].zero_())
    return folder


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_uniform_model_by_hand(uniform, tiny, beginning, evaluate, protocol):
    """With any windows a token costs ln 2001 nats; only the word counts differ."""
    path, text = beginning("wikitext103", 14)
    result = evaluate(uniform, *flags("wikitext103", protocol, path))
    assert result["num_scored_tokens"] >= 0.95 * len(tiny.encode(references.detokenized(text)))
    require_equal(result, {"perplexity": 2001, "nats": result["num_scored_tokens"] * math.log(2001)})


LAST_WORDS = {
    "lambada-strict": references.lambada_strict,
    "lambada-last-token": references.lambada_last_token,
    "lambada-lm-eval": references.lambada_lm_eval,
}


@pytest.fixture(scope="module")
def passages(corpora, tiny, tmp_path_factory):
    """A file of LAMBADA's first rows and of others whose last token is the model's greedy choice, and its rows."""
    texts = references.lambada_rows((corpora / FILES["lambada"]).read_text(encoding="utf-8").splitlines())
    words = " ".join(texts).split()
    contexts = [" ".join(words[at - 60 : at]) for at in range(200, 6_200, 20)]
    # Whatever a model learns in seconds, stop words and opening quotes are what it expects in places.
    known = [
        row for context in contexts if (row := tiny.ended(context))[len(context) :].strip(" ") == row.split(" ")[-1]
    ]
    barred = [row for row in known if row.split(" ")[-1] in STOP_WORDS][:4]
    allowed = [row for row in known if row.split(" ")[-1] not in STOP_WORDS][:8]
    assert (len(barred), len(allowed)) == (4, 8)
    rows = [*texts[:15], *barred, *allowed, texts[19]]
    assert rows[-1].rpartition("\n")[2].isalpha()  # a line break before the last word
    path = tmp_path_factory.mktemp("lambada") / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path, rows


@pytest.mark.parametrize("task", LAST_WORDS)
def test_lambada(tiny, trained_gpt2, passages, evaluate, task):
    path, rows = passages
    result = evaluate(trained_gpt2, *flags(task, "megatron", path))
    require_equal(result, LAST_WORDS[task](tiny, rows))
    assert 0.2 < result["accuracy"] < 0.7
    assert result["num_words"] == len(rows)


def test_lambada_with_a_stop_word_filter(tiny, trained_gpt2, passages, evaluate):
    path, rows = passages
    result = evaluate(trained_gpt2, *flags("lambada", "gpt2-paper", path))
    require_equal(result, references.lambada_stop_word(tiny, rows, STOP_WORDS))
    assert 0.1 < result["accuracy"] < references.lambada_strict(tiny, rows)["accuracy"]  # stop words are barred


@pytest.mark.parametrize("protocol", ["megaft", "gpt2-paper"])
def test_childrens_book_test(tiny, trained_gpt2, beginning, evaluate, protocol):
    path, text = beginning("cbt-cn", 4 * 22)
    result = evaluate(trained_gpt2, *flags("cbt-cn", protocol, path))
    require_equal(result, references.cloze(tiny, text, has_prefix=protocol == "megaft"))
    assert result["accuracy"] > 0


def strict_rows(model, text):
    return references.lambada_strict(model, references.lambada_rows(text.splitlines()))


PUBLISHED = [
    ("wikitext103", "megatron", "wikitext103", 6, lambda m, text: references.megatron(m, text, 1024, 32)),
    ("wikitext2", "hf-docs", "raw", 6, lambda m, text: references.hf_docs(m, references.rows_joined(text), 1024, 512)),
    ("ptb", "megaft", "ptb", 30, lambda m, text: references.megaft(m, [text], detokenizers.get("ptb"), 1024, 512)),
    ("lambada", "megatron", "lambada", 12, strict_rows),
]
"""Task, protocol, file, lines, reference."""


@pytest.mark.parametrize(
    ("task", "protocol", "corpus", "num_lines", "reference"), PUBLISHED, ids=[row[2] for row in PUBLISHED]
)
def test_published_corpora(shared, evaluate, tmp_path, task, protocol, corpus, num_lines, reference):
    model, path = shared / "models/tiny-gpt2-wikitext2", tmp_path / "beginning"
    with (shared / "data" / FILES[corpus]).open(encoding="utf-8", newline="\n") as lines:
        path.write_text(text := "".join(islice(lines, num_lines)), encoding="utf-8", newline="\n")
    require_equal(evaluate(model, *flags(task, protocol, path)), reference(Reference(model), text))


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct converted from its GGUF file to transformers' format."""
    return smol.save(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def smollm2_reference(smollm2):
    return Reference(smollm2)


@slow
def test_smollm2(smollm2, smollm2_reference, short_pages, evaluate):
    path, pages = short_pages("raw", 1, 300)
    result = evaluate(smollm2, *flags("wikitext2", "lm-eval", path, 256))
    require_equal(result, references.lm_eval(smollm2_reference, as_loaded(pages), 256))


@slow
def test_smollm2_on_lambada(smollm2, smollm2_reference, beginning, evaluate_all):
    path, lines = beginning("lambada", 8)
    tasks = ("lambada-strict", "lambada-lm-eval")
    results = evaluate_all(smollm2, *flags(",".join(tasks), "megatron", path))
    for task in tasks:
        expected = LAST_WORDS[task](smollm2_reference, references.lambada_rows(lines.splitlines()))
        # Over so few words exp() makes float32's 5e-7 of the nats a 2e-6 of the perplexity: the nats are compared.
        perplexity = expected.pop("word_perplexity")
        require_equal(results[task], expected)
        assert math.log(results[task]["word_perplexity"]) == pytest.approx(math.log(perplexity), rel=TOLERANCE)
        assert results[task]["accuracy"] > 0.1
