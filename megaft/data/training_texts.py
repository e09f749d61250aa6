"""The texts that a tokenizer is trained on: documents or lines, or an even sample of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megaft.data.corpus import TextLayout, chunks
from megaft.data.text_file import TextFile


@dataclass(slots=True)
class Sample:
    """An even sample of texts, of at most `max_bytes` bytes."""

    stored_bytes: int
    """Bytes of all files as stored."""
    max_bytes: int
    seen_texts: int = 0
    num_texts: int = 0
    """Texts taken."""
    num_bytes: int = 0
    """Their bytes in UTF-8."""

    @property
    def is_partial(self) -> bool:
        """True if texts were left out."""
        return self.num_texts < self.seen_texts

    def take(self, texts: Iterable[str]) -> Iterator[str]:
        """Yield every text, or one in each `stored_bytes / max_bytes` of them."""
        stride = -(-self.stored_bytes // self.max_bytes)
        for text in texts:
            self.seen_texts += 1
            num_bytes = len(text.encode())
            # Compressed files may hold more than they store, hence the second condition.
            if self.seen_texts % stride == 1 % stride and self.num_bytes + num_bytes <= self.max_bytes:
                self.num_texts += 1
                self.num_bytes += num_bytes
                yield text


def texts_of(sources: Sequence[TextFile], layout: TextLayout, *, by_lines: bool) -> Iterator[str]:
    """Yield the documents of all files in pieces that GPT-2's pre-tokenizer splits alike, or their lines.

    Lines keep their line endings.
    """
    for source in sources:
        document: list[str] = []
        for chunk in chunks(source, layout, can_split=True):
            if not by_lines:
                yield chunk.text
                continue
            *lines, rest = chunk.text.split("\n")
            for line in lines:
                yield "".join([*document, line, "\n"])
                document = []
            document.append(rest)
            if chunk.ends_document:
                if last := "".join(document):
                    yield last
                document = []
