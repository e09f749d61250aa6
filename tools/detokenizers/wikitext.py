"""WikiText (Merity et al. 2016), invertibly: reads like Megatron-LM's text, and `retokenize` gives the corpus back."""

import re

from detokenizers import _moses
from detokenizers._lines import Lines

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


LINES = Lines(_moses.mark_joints, _spell, _split, framed=True)


def detokenize(text: str) -> str:
    """Return WikiText as ordinary text: `= = Title = =`, `a @-@ b`, `" x "` and `, ` lose their extra spaces.

    Args:
        text: Any string; lines are taken one by one, so that a page gives what it gives inside its file.

    Returns:
        The text; a word or line that the rules would not give back carries U+2060 before it.
    """
    return "".join(LINES.detokenize([text]))


def retokenize(text: str) -> str:
    """Return x for detokenize(x), whatever x is."""
    return "".join(LINES.retokenize([text]))
