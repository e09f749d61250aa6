"""LAMBADA: split rows of OpenAI's file into context and target, in each published way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluate_zero_shot.protocols import LastWord
from megaft.base.errors import DataError
from megaft.data.records import Record

STOP_WORDS = (
    *("a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "no", "all", "both", "such"),
    *("i", "me", "my", "mine", "you", "your", "yours", "he", "him", "his", "she", "her", "hers", "it", "its", "we"),
    *("us", "our", "ours", "they", "them", "their", "theirs", "myself", "yourself", "himself", "herself", "itself"),
    *("ourselves", "themselves", "who", "whom", "whose", "which", "what", "one"),
    *("am", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had", "having", "do", "does", "did"),
    *("will", "would", "shall", "should", "can", "could", "may", "might", "must"),
    *("and", "or", "but", "nor", "so", "if", "because", "as", "until", "while", "than", "though", "although", "since"),
    *("of", "at", "by", "for", "with", "about", "against", "between", "into", "through", "during", "before", "after"),
    *("above", "below", "to", "from", "up", "down", "in", "out", "on", "off", "over", "under", "upon", "without"),
    *("again", "further", "then", "once", "here", "there", "when", "where", "why", "how", "not", "only", "own"),
    *("same", "too", "very", "just", "even", "also", "more", "most", "other", "few", "now", "like"),
)
"""English function words.

The GPT-2 paper raises its accuracy from 52.66 to 63.24 by "adding a stop-word filter", as an approximation to the rule
that the answer ends a sentence. OpenAI did not publish its list; with this one, results differ from the paper's.
"""


class Example(NamedTuple):
    """Context, possibly empty, and target; an empty target stands for the context's last token."""

    context: str
    target: str


def rows(text: str, path: Path) -> list[str]:
    """Return the passages of a .jsonl file's text.

    Raises:
        DataError: A line is not a JSON object with the key "text", or has fewer than two words; names the line.
    """
    numbered = enumerate(text.split("\n"), 1)
    return [_passage(line, f"{path}, line {number}") for number, line in numbered if line.strip()]


def _passage(line: str, where: str) -> str:
    passage = Record(where, line).text("text")
    if len(passage.split()) < 2:
        raise DataError(
            f"{where}: the text {passage!r} has fewer than two words; give a passage with a context and a last word."
        )
    return passage


def examples(rows: Sequence[str], variant: LastWord) -> list[Example]:
    """Return the context and target of each passage.

    Args:
        rows: Passages, already detokenized as the protocol wants.
        variant: "strict" is Megatron-LM's: the last word by `split()`, with a space before it, after the stripped text
            before it. "last-token" is its default: the tokenizer decides, so the target is empty. "lm-eval" splits at
            the last space, and moves white space at the context's end to the target. "stop-word" is like "strict" but
            keeps white space at the beginning (OpenAI's preprocessing puts a newline there); the first token may not
            be one of `stop_tokens`.
    """
    return [_SPLIT[variant](row) for row in rows]


def _strict(row: str) -> Example:
    word = row.split()[-1]
    return Example(row[: row.rfind(word)].strip(), f" {word}")


def _stop_word(row: str) -> Example:
    word = row.split()[-1]
    return Example(row[: row.rfind(word)].rstrip(), f" {word}")


def _lm_eval(row: str) -> Example:
    before, _, word = row.rpartition(" ")
    context = before.rstrip()
    return Example(context, f"{before[len(context) :]} {word}")


_SPLIT: dict[str, Callable[[str], Example]] = {
    "strict": _strict,
    "last-token": lambda row: Example(row, ""),
    "lm-eval": _lm_eval,
    "stop-word": _stop_word,
}


def stop_tokens(encode: Callable[[str], Sequence[int]]) -> frozenset[int]:
    """Return the ids of stop words that are one token with their space; longer stop words are not filtered.

    Args:
        encode: A space and a word -> its token ids inside a text.
    """
    encoded = [encode(f" {word}") for word in STOP_WORDS]
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)
