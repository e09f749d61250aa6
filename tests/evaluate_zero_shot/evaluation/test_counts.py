"""Known word and GPT-2 token counts of published corpora."""

import re

import detokenizers
import pytest

from evaluate_zero_shot.evaluation import counts
from evaluate_zero_shot.texts import pages
from megaft.data.tokenizer import load_tokenizer

WIKITEXT103 = "wikitext103/wiki.test.tokens"
WIKITEXT2 = "wikitext2/wiki.test.tokens"
RAW = "wikitext2_raw/wiki.test.raw"


@pytest.fixture(scope="module")
def read(shared):
    return lambda name: (shared / "data" / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def num_tokens(shared):
    tokenizer = load_tokenizer(shared / "data/gpt2_bpe")
    return lambda *texts: sum(map(len, tokenizer.encode_batch(texts)))


@pytest.mark.parametrize(
    ("text", "words", "original_tokens"),
    [
        pytest.param("", 0, 1, id="nothing is one empty token"),
        pytest.param("a b", 2, 2, id="words"),
        pytest.param(" \n = A b = \n \n c , d \n", 7, 9, id="newlines within are tokens, those around are not"),
        pytest.param("a  b\nc", 3, 3, id="a token between two spaces is empty, and a line's end parts none"),
    ],
)
def test_words_and_original_tokens_by_hand(text, words, original_tokens):
    assert (counts.num_words(text), counts.num_original_tokens(text)) == (words, original_tokens)


def test_what_is_detokenized_at_once_changes_the_count_of_generated_pages(corpora, gpt2_bpe):
    """Quotes pair over the ends of lines: rules that stay within a line find other words."""
    detokenize, tokenizer = detokenizers.get("wikitext_megatron"), load_tokenizer(gpt2_bpe)
    text = (corpora / RAW).read_text(encoding="utf-8")
    pages_of = pages.wikitext_pages(text)
    whole, by_page, by_line = (
        sum(map(len, tokenizer.encode_batch(list(map(detokenize, texts)))))
        for texts in ([text], pages_of, text.split("\n"))
    )
    assert len({whole, by_page, by_line}) == 3


@pytest.mark.parametrize(
    ("name", "words", "original_tokens", "lines"),
    [
        (WIKITEXT103, 241_211, 245_566, 4_358),  # 245,566 is the published one (Megatron-LM)
        (WIKITEXT2, 241_211, 245_566, 4_358),
        (RAW, 241_211, 245_570, 4_358),
        ("ptb/ptb.test.txt", None, 82_429, None),
    ],
)
def test_words_and_original_tokens(read, name, words, original_tokens, lines):
    text = read(name)
    assert counts.num_original_tokens(text) == original_tokens
    assert words is None or (counts.num_words(text), text.count("\n")) == (words, lines)


@pytest.mark.slow
def test_the_published_pair_of_wikitext103_is_of_the_stripped_text(read, num_tokens):
    detokenize = detokenizers.get("wikitext_megatron")
    text = read(WIKITEXT103)
    assert num_tokens(detokenize(text)) == 270_330
    assert num_tokens(detokenize(text.strip())) == 270_329


@pytest.mark.slow
def test_what_is_detokenized_at_once_changes_the_count(read, num_tokens):
    detokenize = detokenizers.get("wikitext_megatron")
    text = read(RAW)
    assert num_tokens(detokenize(text)) == 272_045
    _, *whole_pages = re.split(r"(?m)^(?= = [^=].*[^=] = $)", text)
    assert len(whole_pages) == 62
    assert num_tokens(*map(detokenize, whole_pages)) == 272_082
    assert num_tokens(*map(detokenize, pages.wikitext_pages(text))) == 272_031  # without the newlines between pages
    assert num_tokens("\n".join(map(detokenize, text.split("\n")))) == 276_263  # rules that stay within a line


@pytest.mark.parametrize(
    ("name", "chunk", "expected"),  # chunks of lm-finetuning's notes
    [
        (WIKITEXT2, 255, 1_160),
        ("wikitext2/wiki.valid.tokens", 256, 1_010),
        (WIKITEXT103, 255, 1_118),
        pytest.param("wikitext2/wiki.train.tokens", 256, 9_563, marks=pytest.mark.slow),
    ],
)
def test_number_of_chunks(read, num_tokens, name, chunk, expected):
    assert num_tokens(read(name)) // chunk == expected
