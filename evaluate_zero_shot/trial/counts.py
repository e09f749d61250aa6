"""Word and byte counts of the original text by each protocol's rule: the divisors of nats."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evaluate_zero_shot.protocols import Protocol


def num_original_tokens(text: str) -> int:
    """Return Megatron-LM's T_o: the tokens of a word-tokenized file."""
    return len(text.strip().split(" "))


def num_words(document: str) -> int:
    """Return the words between white space."""
    return len(document.split())


def num_bytes(text: str) -> int:
    """Return the bytes of the text in its file."""
    return len(text.encode("utf-8", "surrogateescape"))


def word_divisor(protocol: Protocol, text: str, documents: Sequence[str]) -> int:
    """Return the protocol's divisor of nats in word perplexity.

    Args:
        protocol: Whose rule.
        text: The whole file, before any detokenizing.
        documents: The same text by documents.
    """
    if protocol.words == "whitespace":
        return num_words(text)
    if protocol.words == "spaces":
        return text.count(" ")
    if protocol.words == "whitespace, per document":
        return sum(len(re.split(r"\s+", document)) for document in documents)
    return num_original_tokens(text) - (protocol.words == "original tokens, less one")
