import subprocess
import sys

import detokenizers
import pytest

MEGATRON = [
    pytest.param("wikitext_megatron", "the boys ' book", "the boys' book", id="plural possessive"),
    pytest.param("wikitext_megatron", "1 @,@ 000 @.@ 5 well @-@ known", "1,000.5 well-known", id="joined by @"),
    pytest.param(
        "wikitext_megatron", "a , b . c ; d : e ! f ?", "a, b. c; d: e! f ?", id="no space, no mark, at the end"
    ),
    pytest.param("wikitext_megatron", "( a ) [ b ] { c }", "(a) [b] {c}", id="brackets"),
    pytest.param("wikitext_megatron", 'x " a\n" y', 'x "a" y', id="quotes cross lines"),
    pytest.param("wikitext_megatron", " = = = Title = = = \n", " === Title ===\n", id="heading"),
    pytest.param("wikitext_megatron", "5 ° C N x 's", "5°C 1 x's", id="degree, number, possessive"),
    pytest.param("wikitext_megatron", "a N b", "a 1 b", id="number"),
    pytest.param("wikitext_megatron", "/' 5/", "/'[0-9]/", id="the rule that was meant otherwise"),
    pytest.param("ptb_megatron", "october N with $ N it 's do n't \n x", "october1 with $1 it's don't\nx", id="ptb"),
    pytest.param("identity", " = a @-@ b = \n", " = a @-@ b = \n", id="identity"),
]


@pytest.mark.parametrize(("name", "text", "expected"), MEGATRON)
def test_rules(name, text, expected):
    assert detokenizers.get(name)(text) == expected


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'wikitext'; use one of identity, ptb_megatron, wikitext_megatron"):
        detokenizers.get("wikitext")


def test_imports_only_re():
    program = "import re, sys; before = set(sys.modules); import detokenizers; print(*set(sys.modules) - before)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {name.partition(".")[0] for name in loaded} <= {"detokenizers", "collections", "__future__"}
