"""Word and byte counts of the original text by each protocol's rule, by which nats are divided."""

from __future__ import annotations

import re
from collections.abc import Sequence

from evaluate_zero_shot.protocols import Protocol, Words


def num_original_tokens(text: str) -> int:
    """Return Megatron-LM's T_o: the number of tokens of a word-tokenized file."""
    return len(text.strip().split(" "))


def num_words(document: str) -> int:
    """Return the number of words between white space."""
    return len(document.split())


def num_bytes(text: str) -> int:
    """Return the number of bytes of the text in its file."""
    return len(text.encode("utf-8", "surrogateescape"))


def word_divisor(protocol: Protocol, text: str, documents: Sequence[str]) -> int:
    """Return the protocol's divisor of nats in word perplexity.

    Args:
        protocol: Protocol, whose rule is applied.
        text: The whole file, before detokenizing.
        documents: The documents of the same text.
    """
    match Words(protocol.words):
        case Words.WHITESPACE:
            return num_words(text)
        case Words.ORIGINAL:
            return num_original_tokens(text)
        case Words.ADJUSTED:
            return num_original_tokens(text) - 1
        case Words.PER_DOCUMENT:
            return sum(len(re.split(r"\s+", document)) for document in documents)
        case Words.SPACES:
            return text.count(" ")
