"""Detokenizer of corpora that are natural text already; it changes nothing."""

from collections.abc import Iterable, Iterator


class _UnchangedLines:
    def detokenize(self, chunks: Iterable[str]) -> Iterator[str]:
        return iter(chunks)

    retokenize = detokenize


class Unchanged:
    """Entry of the detokenizer table that returns every text as it is.

    Args:
        source: One line: the corpus, and the reason why there is nothing to undo.
    """

    LINES = _UnchangedLines()

    def __init__(self, source: str) -> None:
        self.SOURCE = source

    def detokenize(self, text: str) -> str:
        """Return the text as it is."""
        return text

    retokenize = detokenize
