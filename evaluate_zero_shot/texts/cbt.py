"""Children's Book Test: read questions into contexts and candidate continuations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaft.base.errors import DataError
from megaft.base.plural import counted

BLANK = "XXXXX"
SENTENCES = 21


@dataclass(frozen=True, slots=True)
class Question:
    """Twenty sentences of context, a sentence with a blank, and the candidates for the blank.

    Attributes:
        context: The twenty sentences, joined by spaces.
        before: Text of the last sentence before the blank; may be empty.
        after: Text of the last sentence after the blank.
        candidates: Candidate words, usually ten.
        answer: Index of the correct candidate.
    """

    context: str
    before: str
    after: str
    candidates: tuple[str, ...]
    answer: int


def questions(text: str, path: Path) -> list[Question]:
    """Return the questions of a file: numbered lines 1 to 21, the last with answer and candidates, then a blank line.

    Raises:
        DataError: A line is out of order, or a last line has no blank, answer or candidates; names the line.
    """
    return [_question(block, path) for block in _blocks(text)]


def options(question: Question) -> list[tuple[str, str]]:
    """Return a context and a continuation for each candidate; the most probable continuation is the model's choice.

    The continuation is the candidate and the rest of the sentence, as the GPT-2 paper scores it, not divided by its
    length. Words and punctuation stay as in the file (Penn tokenization: `` '' -LRB-). The paper removed that by rules
    it does not give, and rules that look across the blank could change what is given from what is predicted.
    """
    context = f"{question.context} {question.before}".rstrip()
    return [(context, f" {candidate}{question.after}") for candidate in question.candidates]


def first_questions(text: str, count: int) -> str:
    """Return the text up to the end of a number of questions."""
    blocks = list(_blocks(text))[:count]
    return "\n".join("".join(f"{line}\n" for _, line in block) for block in blocks)


def _blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    block: list[tuple[int, str]] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            block.append((number, line))
        elif block:
            yield block
            block = []


def _question(block: list[tuple[int, str]], path: Path) -> Question:
    sentences = [_sentence(index, *line, path) for index, line in enumerate(block, 1)]
    where = f"{path}, line {block[-1][0]}"
    if len(sentences) != SENTENCES:
        raise DataError(
            f"{where} ends a question after {counted(len(sentences), 'line')}; it has {SENTENCES}, then a blank line."
        )
    query, *answers = sentences[-1].rstrip().split("\t")
    before, blank, after = query.partition(BLANK)
    if not blank or len(answers) < 2:
        raise DataError(
            f"{where} must be a sentence with {BLANK}, a tab, the answer, two tabs, and candidates separated by |."
        )
    candidates = tuple(filter(None, answers[-1].split("|")))
    if answers[0] not in candidates:
        raise DataError(f"{where}: the answer {answers[0]!r} is not among the candidates {answers[-1]!r}.")
    return Question(" ".join(sentences[:-1]), before, after, candidates, candidates.index(answers[0]))


def _sentence(index: int, number: int, line: str, path: Path) -> str:
    numeral, _, sentence = line.partition(" ")
    if numeral != str(index) or index > SENTENCES:
        raise DataError(
            f"{path}, line {number} begins {line[:20]!r}; a question's lines are numbered 1 to {SENTENCES}, and a "
            "blank line follows."
        )
    return sentence.rstrip() if index < SENTENCES else sentence
