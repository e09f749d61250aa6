"""Detokenizers by name: functions from str to str, each of which undoes the word tokenization of one corpus.

`NAME` is invertible: `inverse(NAME)` restores the corpus exactly, for every string. `NAME_publisher` follows the
rules of that publisher, with their defects; these lose information. `python -m detokenizers --list` lists all of them.

Detokenizers import nothing but `re`, so that any program can use them. To add one, add an entry to the table below: an
`Unchanged`, or a module with SOURCE and `detokenize`, and with `retokenize` and LINES (invertible) or KNOWN_COLLISIONS
(lossy).
"""

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType

from detokenizers import (
    lambada_openai,
    one_billion_words,
    one_billion_words_sedd,
    ptb,
    ptb_megatron,
    wikitext,
    wikitext_megatron,
)
from detokenizers._unchanged import Unchanged

_TABLE: dict[str, ModuleType | Unchanged] = {
    "identity": Unchanged("any text: nothing is changed"),
    "wikitext": wikitext,
    "wikitext_megatron": wikitext_megatron,
    "ptb": ptb,
    "ptb_megatron": ptb_megatron,
    # OpenAI's release is the books' own text. Some passages have curly quotes, others straight ones: making them alike,
    # as `lambada_openai` does, would lose which. The first release (lower case, split into words) is another corpus.
    "lambada": Unchanged("LAMBADA as OpenAI released it is natural text: nothing to undo"),
    "lambada_openai": lambada_openai,
    "1bw": one_billion_words,
    "1bw_sedd": one_billion_words_sedd,
    # The capitals and punctuation that text8 was stripped of cannot be restored.
    "text8": Unchanged("text8 holds only a-z and spaces: nothing to undo"),
}


def names() -> tuple[str, ...]:
    """Return the names of all detokenizers."""
    return tuple(_TABLE)


def get(name: str) -> Callable[[str], str]:
    """Return the detokenizer called `name`.

    Raises:
        ValueError: There is no such name; the message lists the names.
    """
    return _entry(name).detokenize


def inverse(name: str) -> Callable[[str], str] | None:
    """Return the retokenizer r with r(get(name)(x)) == x for every x; None if the rules lose information.

    Raises:
        ValueError: There is no such name.
    """
    return getattr(_entry(name), "retokenize", None)


def is_invertible(name: str) -> bool:
    """Return True if the detokenizer has an inverse.

    Raises:
        ValueError: There is no such name.
    """
    return inverse(name) is not None


def stream(name: str, *, invert: bool = False) -> Callable[[Iterable[str]], Iterator[str]]:
    """Return a streaming `get(name)`, or its inverse: from pieces of a text to pieces of the result.

    Invertible detokenizers need constant memory. Published ones look across lines, so they gather the whole text.

    Raises:
        ValueError: There is no such name, or it has no inverse.
    """
    entry = _entry(name)
    if is_invertible(name):
        return entry.LINES.retokenize if invert else entry.LINES.detokenize
    if invert:
        raise ValueError(f"{name} loses information and has no inverse; {name.partition('_')[0]} has one.")
    return lambda chunks: iter([entry.detokenize("".join(chunks))])


def source(name: str) -> str:
    """Return one line that names the corpus, and the publication whose rules are followed.

    Raises:
        ValueError: There is no such name.
    """
    return _entry(name).SOURCE


def known_collisions(name: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of different texts that the rules turn into the same text; empty if the rules are invertible.

    Raises:
        ValueError: There is no such name.
    """
    return getattr(_entry(name), "KNOWN_COLLISIONS", ())


def _entry(name: str) -> ModuleType | Unchanged:
    if name not in _TABLE:
        raise ValueError(f"there is no detokenizer {name!r}; use one of {', '.join(_TABLE)}.")
    return _TABLE[name]
