"""Invertible detokenizer of Mikolov's Penn Treebank: as Megatron-LM's rules, but N stays N."""

import re

from detokenizers._lines import LineDetokenizer

SOURCE = "Penn Treebank as Mikolov prepared it: lower case, no punctuation, N for numbers"

_CLITIC = r"n't|'(?:s|re|ve|m|ll|d)?"
_JOINTS = re.compile(rf" (?=(?:{_CLITIC})(?: |$))|(?<=[$#]) (?=N(?: |$))")
_NEGATION = re.compile(r"(?<=.)n't$")
_APOSTROPHE = re.compile(r"(?<=.)(?='(?:s|re|ve|m|ll|d)?$)")
_CURRENCY = re.compile(r"(?<=[$#])(?=N$)")


def _mark_joints(line: str) -> str:
    return _JOINTS.sub("\n", line)


def _spell(token: str) -> str:
    return token.replace("\\/", "/")


def _split(word: str) -> str:
    word = _APOSTROPHE.sub(" ", _NEGATION.sub(" n't", _CURRENCY.sub(" ", word)))
    return word.replace("/", "\\/")


LINES = LineDetokenizer(_mark_joints, _spell, _split, framed=True)


def detokenize(text: str) -> str:
    r"""Return the Penn Treebank as ordinary text: `do n't`, `it 's` and `$ N` lose their space, `\/` its backslash.

    Args:
        text: Any string; each line is treated separately.

    Returns:
        The text; U+2060 precedes a word or line that the rules alone could not restore.
    """
    return "".join(LINES.detokenize([text]))


def retokenize(text: str) -> str:
    """Return the exact inverse of detokenize: retokenize(detokenize(x)) == x for every string x."""
    return "".join(LINES.retokenize([text]))
