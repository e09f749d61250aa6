"""Invertible detokenizer of WikiText (Merity et al. 2016); its text reads like that of Megatron-LM's rules."""

import re

from detokenizers import _moses
from detokenizers._lines import LineDetokenizer

SOURCE = "WikiText-2 and -103, with or without <unk>"

_SPELLINGS = {"@-@": "-", "@,@": ",", "@.@": "."}
_NUMBER = re.compile(r"(?<=\d)([.,])(?=\d)")
_HYPHEN = re.compile(r"(?<=[^-@ ])-(?=[^-@ ])")


def _spell(token: str) -> str:
    return _SPELLINGS.get(token, token)


def _split(word: str) -> str:
    if word == "=" * len(word):
        return " ".join(word)
    return _HYPHEN.sub(" @-@ ", _NUMBER.sub(r" @\1@ ", _moses.split(word)))


LINES = LineDetokenizer(_moses.mark_joints, _spell, _split, framed=True)


def detokenize(text: str) -> str:
    """Return WikiText as ordinary text: `= = Title = =`, `a @-@ b`, `" x "` and `, ` lose their extra spaces.

    Args:
        text: Any string. Each line is treated separately, so a page reads the same inside its file and alone.

    Returns:
        The text; U+2060 precedes a word or line that the rules alone could not restore.
    """
    return "".join(LINES.detokenize([text]))


def retokenize(text: str) -> str:
    """Return the exact inverse of detokenize: retokenize(detokenize(x)) == x for every string x."""
    return "".join(LINES.retokenize([text]))
