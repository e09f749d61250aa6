"""Split a text into documents: lm-evaluation-harness's pages, the hub's rows, and lossless documents."""

from __future__ import annotations

import io

from evaluate_zero_shot.tasks import Task


def lines(text: str) -> list[str]:
    r"""Return the lines with their ends. Only \n ends a line, unlike in `str.splitlines`."""
    return list(io.StringIO(text, newline="\n"))


def wikitext_pages(text: str) -> list[str]:
    r"""Return the pages of EleutherAI/wikitext_document_level, which lm-evaluation-harness scores.

    A page begins at every line that reads `= Title =`, even inside a formula, and lines are joined by \n again: what
    stands before the first title, and the newline before every other, are lost. On wiki.test.raw that gives 62 pages of
    241,335 words, as len(re.split(r"\s+", page)), and 1,290,527 bytes (of 1,290,590): the denominators behind published
    lm-eval results, since ln(word_perplexity) / (ln 2 * bits_per_byte) of the pairs in EleutherAI/lm-evaluation-harness
    issue 806 (Llama-2-7B: 8.792073612124492, 0.5864857250704371) is 1,290,527 / 241,335 to all digits.
    """
    pages: list[list[str]] = [[]]
    for line in text.split("\n"):
        if _is_title(line):
            pages.append([])
        pages[-1].append(line)
    joined = ["\n".join(page) for page in pages]
    return [page for page in joined[:-1] if page.strip()] + joined[-1:]


def hf_rows(text: str) -> str:
    r"""Return the text as the example in transformers' perplexity.md builds it: 287,644 GPT-2 tokens of wiki.test.raw.

    It is "\n\n".join(rows) of the rows of Salesforce/wikitext: the lines with their \n, and "" for a blank line.
    """
    return "\n\n".join(line if line.strip() else "" for line in lines(text))


def documents(text: str, task: Task) -> list[str]:
    """Return the task's documents: pages, lines, or the text.

    Joined, they give the text again; no document is blank, unless the text is.

    Pages are the articles: a title stands between blank lines, which leaves out the formulas and table heads that
    `wikitext_pages` takes for titles. WikiText-2 then has its 600, 60 and 60 articles (Merity et al. 2016, table 1).
    """
    match task.unit:
        case "file":
            return [text] if text else []
        case "line":
            rows = lines(text)
            return _join_documents(rows, [bool(row.strip()) for row in rows])
        case "page":
            rows = lines(text)
            return _join_documents(
                rows, [_is_title(row) and _has_blank_neighbors(rows, at) for at, row in enumerate(rows)]
            )


def _is_title(line: str) -> bool:
    """Return True for an article's title by lm-eval's rule: `= Title =`; a section's has more signs."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _has_blank_neighbors(rows: list[str], at: int) -> bool:
    return not any(row.strip() for row in [*rows[max(at - 1, 0) : at], *rows[at + 1 : at + 2]])


def _join_documents(rows: list[str], begins: list[bool]) -> list[str]:
    """Join lines into documents; a document begins at a flagged line if the document before it is not blank."""
    joined: list[list[str]] = [[]]
    is_blank = True
    for row, may_begin in zip(rows, begins, strict=True):
        if may_begin and not is_blank:
            joined.append([])
            is_blank = True
        is_blank = is_blank and not row.strip()
        joined[-1].append(row)
    return ["".join(document) for document in joined if document]
