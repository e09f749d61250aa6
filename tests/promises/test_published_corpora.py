"""Published corpora are complete if present, and always present in CI; generated ones have the same formats."""

import hashlib
import os

import published
import pytest


def test_ci_has_the_published_corpora():
    """Without them, tests of published counts are skipped, and the promises are tested on generated texts."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        assert published.IS_PRESENT, published.ABSENT


def test_published_corpora_are_whole(shared):
    manifest = (shared / "data/MANIFEST.sha256").read_text().splitlines()
    expected = {name: sha256 for sha256, name in (line.split(maxsplit=1) for line in manifest)}
    found = {name: hashlib.sha256((shared / "data" / name).read_bytes()).hexdigest() for name in expected}
    assert found == expected


FORMS = {
    "wikitext103/wiki.test.tokens": [" @-@ ", " @.@ ", " <unk> ", " \n = ", " \n = = ", " 's ", ' " ', " ( ", " ; "],
    "wikitext2_raw/wiki.test.raw": [" @-@ ", " @.@ ", " \n = ", " \n = = ", " 's ", ' " ', " ( ", " ; "],
    "ptb/ptb.test.txt": [" N ", " <unk> ", " n't ", " 's ", " \n "],
    "1bw/news.en.heldout-00000-of-00050": [" 's ", " , ", " ( ", " .\n"],
    "lambada/lambada_test.jsonl": ["\\u201c", "\\n\\n", '"}\n{"text": "'],
    "cbt/cbtest_CN_valid_2000ex.txt": ["XXXXX", "\n\n1 ", "\t\t"],
    "text8/text8": [" the ", " of "],
    "book.txt": ["\ufeff", "\r\n\r\n"],
}


@pytest.mark.parametrize("name", FORMS)
def test_generated_corpora_have_the_forms_of_the_published(corpora, name):
    text = (corpora / name).read_bytes().decode()
    assert [mark for mark in FORMS[name] if mark not in text] == []
    assert len(text) > 50_000
