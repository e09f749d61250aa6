"""Detokenizers by name: each undoes the word tokenization of one corpus, str -> str.

`NAME` is invertible: `inverse(NAME)` gives the corpus back from the text, exactly, for every string. `NAME_somebody`
are the rules somebody published figures with, quirks included: they lose information. `python -m detokenizers --list`
tells what there is.

They import nothing but `re`, so that any program can use them.
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

from detokenizers import (
    identity,
    lambada,
    lambada_openai,
    one_billion_words,
    one_billion_words_sedd,
    ptb,
    ptb_megatron,
    text8,
    wikitext,
    wikitext_megatron,
)

_ALL = {
    "identity": identity,
    "wikitext": wikitext,
    "wikitext_megatron": wikitext_megatron,
    "ptb": ptb,
    "ptb_megatron": ptb_megatron,
    "lambada": lambada,
    "lambada_openai": lambada_openai,
    "1bw": one_billion_words,
    "1bw_sedd": one_billion_words_sedd,
    "text8": text8,
}


def names() -> tuple[str, ...]:
    """Return the names that `get` knows."""
    return tuple(_ALL)


def get(name: str) -> Callable[[str], str]:
    """Return the detokenizer called `name`.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    return _module(name).detokenize


def inverse(name: str) -> Callable[[str], str] | None:
    """Return the retokenizer r with r(get(name)(x)) == x for every x, or None where the rules lose information.

    Raises:
        ValueError: There is no such name.
    """
    return getattr(_module(name), "retokenize", None)


def is_invertible(name: str) -> bool:
    """Return whether `inverse(name)` exists.

    Raises:
        ValueError: There is no such name.
    """
    return inverse(name) is not None


def stream(name: str, *, invert: bool = False) -> Callable[[Iterable[str]], Iterator[str]]:
    """Return `get(name)`, or its inverse, from pieces of a text to pieces of the same result.

    The invertible ones need constant memory. The published ones look across lines, so they gather the whole text.

    Raises:
        ValueError: There is no such name, or it has no inverse.
    """
    module = _module(name)
    if is_invertible(name):
        return module.LINES.retokenize if invert else module.LINES.detokenize
    if invert:
        raise ValueError(f"{name} loses information and has no inverse; {name.partition('_')[0]} has one.")
    return lambda chunks: iter([module.detokenize("".join(chunks))])


def source(name: str) -> str:
    """Return in a line which text the detokenizer is for, and whose rules it follows.

    Raises:
        ValueError: There is no such name.
    """
    return _module(name).SOURCE


def quirks(name: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of texts that the rules make the same; none where they are invertible.

    Raises:
        ValueError: There is no such name.
    """
    return getattr(_module(name), "QUIRKS", ())


def _module(name: str) -> ModuleType:
    if name not in _ALL:
        raise ValueError(f"there is no detokenizer {name!r}; use one of {', '.join(_ALL)}.")
    return _ALL[name]
