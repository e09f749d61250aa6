import re
from itertools import pairwise
from math import log

import corpora as made
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts.pages import documents, hf_rows, lines, wikitext_pages

# Line ends and blanks of every kind, headings true and false.
PARTS = [
    "\n",
    " \n",
    "\r\n",
    "\r",
    "\x0b",
    "\u2028",
    " = A b = \n",
    " = = C = = \n",
    " x = 1 ; = y = \n",
    " = x",
    "a .",
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=30).map("".join)


@pytest.fixture(scope="module")
def raw(shared):
    return (shared / "data/wikitext2_raw/wiki.test.raw").read_bytes().decode()


def words(page):
    return len(re.split(r"\s+", page))  # as lm-evaluation-harness counts them


def test_lm_eval_pages_of_raw_test(raw):
    pages = wikitext_pages(raw)
    assert len(pages) == 62
    assert sum(map(words, pages)) == 241_335
    assert sum(len(page.encode()) for page in pages) == 1_290_527
    assert pages[0].startswith(" = Robert Boulter = \n")
    assert {page[0] for page in pages} == {" "}


@pytest.mark.parametrize(
    ("word_perplexity", "bits_per_byte"),
    [
        # EleutherAI/lm-evaluation-harness issue 806
        pytest.param(8.792073612124492, 0.5864857250704371, id="Llama-2-7B"),
        # a log of torchtune's recipe eleuther_eval
        pytest.param(11.769043842838464, 0.6651627944965424, id="torchtune"),
    ],
)
def test_denominators_are_those_behind_published_lm_eval_figures(raw, word_perplexity, bits_per_byte):
    pages = wikitext_pages(raw)
    bytes_per_word = log(word_perplexity) / (log(2) * bits_per_byte)
    assert sum(len(page.encode()) for page in pages) == pytest.approx(bytes_per_word * sum(map(words, pages)), abs=1e-6)


@pytest.mark.slow
def test_hub_rows_of_raw_test_make_the_tokens_of_the_documentation(raw, shared):
    gpt2 = GPT2TokenizerFast.from_pretrained(shared / "data/gpt2_bpe", model_max_length=10**9)
    text = hf_rows(raw)
    assert text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is")
    assert len(gpt2(text)["input_ids"]) == 287_644


@pytest.mark.parametrize(
    ("file", "task", "num_documents"),
    [
        # WikiText-2 has 600, 60 and 60 articles: Merity et al. 2016, table 1.
        pytest.param("wikitext2/wiki.train.tokens", "wikitext2", 600, id="WikiText-2 train"),
        pytest.param("wikitext2/wiki.valid.tokens", "wikitext2", 60, id="WikiText-2 validation"),
        pytest.param("wikitext2/wiki.test.tokens", "wikitext2", 60, id="WikiText-2 test"),
        pytest.param("wikitext103/wiki.test.tokens", "wikitext103", 60, id="WikiText-103 test"),
        pytest.param("wikitext2_raw/wiki.test.raw", "wikitext103", 60, id="raw test"),
        pytest.param("ptb/ptb.test.txt", "ptb", 1, id="Penn Treebank is one document"),
        pytest.param("ptb/ptb.test.txt", "1bw", 3_761, id="a document a line"),
    ],
)
def test_documents_of_real_corpora(shared, file, task, num_documents):
    text = (shared / "data" / file).read_bytes().decode()
    found = documents(text, TASKS[task])
    assert len(found) == num_documents
    assert "".join(found) == text


@pytest.mark.parametrize(
    ("file", "task", "num_documents"),
    [
        pytest.param("wikitext2/wiki.test.tokens", "wikitext2", len(made.articles()), id="WikiText-2"),
        pytest.param("wikitext103/wiki.test.tokens", "wikitext103", len(made.articles()), id="WikiText-103"),
        pytest.param("wikitext2_raw/wiki.test.raw", "wikitext103", len(made.articles()), id="raw"),
        pytest.param("ptb/ptb.test.txt", "ptb", 1, id="Penn Treebank is one document"),
        pytest.param("1bw/news.en.heldout-00000-of-00050", "1bw", len(made.sentences()), id="a document a line"),
    ],
)
def test_documents_of_generated_corpora(corpora, file, task, num_documents):
    text = (corpora / file).read_bytes().decode()
    found = documents(text, TASKS[task])
    assert len(found) == num_documents
    assert "".join(found) == text


def test_lm_eval_pages_of_generated_articles(corpora):
    text = (corpora / "wikitext2_raw/wiki.test.raw").read_bytes().decode()
    pages = wikitext_pages(text)
    assert [page.split("\n")[0] for page in pages] == [
        f" = {made.wikitext_words(title)} = " for title, _ in made.articles()
    ]
    # What stands before the first title is lost, " \n", and a newline before every other.
    assert sum(len(page.encode()) for page in pages) == len(text.encode()) - len(" \n") - (len(pages) - 1)


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        pytest.param("text", "", [], id="nothing"),
        pytest.param("text", " a \n\n b", [" a \n\n b"], id="file"),
        pytest.param("1bw", "a .\nb .", ["a .\n", "b ."], id="lines, no final newline"),
        pytest.param("1bw", "\na\n\n\nb\n", ["\na\n\n\n", "b\n"], id="blank lines join the line before"),
        pytest.param("1bw", "a\u2028b\x0bc\r\nd", ["a\u2028b\x0bc\r\n", "d"], id="only LF ends a line"),
        pytest.param("wikitext2", " \n = A = \n \n a \n", [" \n = A = \n \n a \n"], id="blanks before the first title"),
        pytest.param(
            "wikitext2", " = A = \n \n a \n \n = B = \n \n", [" = A = \n \n a \n \n", " = B = \n \n"], id="titles"
        ),
        pytest.param(
            "wikitext2", " = A = \n \n L = \n = 1 = \n b \n", [" = A = \n \n L = \n = 1 = \n b \n"], id="formula"
        ),
        pytest.param("wikitext2", " = A = \n \n = = S = = \n \n", [" = A = \n \n = = S = = \n \n"], id="section"),
        pytest.param("wikitext2", "no title", ["no title"], id="no title"),
    ],
)
def test_documents(task, text, expected):
    assert documents(text, TASKS[task]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(" \n = A = \n a \n = B = \n", [" = A = \n a ", " = B = \n"], id="newlines between are lost"),
        pytest.param("x\n = A = \n", ["x", " = A = \n"], id="text before the first title is a page"),
        pytest.param(" = A = \n = = S = = \n", [" = A = \n = = S = = \n"], id="a section is none"),
        pytest.param(" \n", [" \n"], id="the last page may be blank"),
    ],
)
def test_wikitext_pages(text, expected):
    assert wikitext_pages(text) == expected


@given(TEXTS)
@pytest.mark.parametrize("task", ["wikitext2", "ptb", "1bw", "text"])
def test_documents_joined_are_the_text_and_none_is_blank(task, text):
    found = documents(text, TASKS[task])
    assert "".join(found) == text
    assert all(document.strip() for document in found) or not text.strip()


@given(TEXTS)
def test_an_article_begins_where_a_page_does(text):
    starts = {page.split("\n")[0] for page in wikitext_pages(text)}
    articles = documents(text, TASKS["wikitext2"])
    assert {article.split("\n")[0] for _, article in pairwise(articles)} <= starts


@given(TEXTS)
def test_lines_keep_their_ends(text):
    assert "".join(lines(text)) == text
    assert not any("\n" in line[:-1] for line in lines(text))
