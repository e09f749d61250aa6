"""Detokenizers by name: each undoes the word tokenization of one corpus, str -> str.

They import nothing but `re`, so that any program can use them.
"""

from collections.abc import Callable

from detokenizers import identity, ptb_megatron, wikitext_megatron

_ALL = {module.__name__.rpartition(".")[2]: module.detokenize for module in (identity, ptb_megatron, wikitext_megatron)}


def names() -> tuple[str, ...]:
    """Return the names that `get` knows."""
    return tuple(_ALL)


def get(name: str) -> Callable[[str], str]:
    """Return the detokenizer called `name`.

    Raises:
        ValueError: There is none; the message lists those there are.
    """
    if name not in _ALL:
        raise ValueError(f"there is no detokenizer {name!r}; use one of {', '.join(_ALL)}.")
    return _ALL[name]
