"""For text that was never tokenized into words."""

from collections.abc import Iterable, Iterator

SOURCE = "any text: nothing is changed"


class _Unchanged:
    def detokenize(self, chunks: Iterable[str]) -> Iterator[str]:
        return iter(chunks)

    retokenize = detokenize


LINES = _Unchanged()


def detokenize(text: str) -> str:
    """Return the text as it is."""
    return text


retokenize = detokenize
