"""Report on a prepared dataset: its size, the share of scored tokens, and documents that are left out or unscored."""

from __future__ import annotations

from typing import Any

from megaft.chat import SCORED_ROLE
from megaft.plural import counted


def summary(output: object, receipt: dict[str, Any]) -> str:
    """Return one line with the numbers of documents and tokens."""
    skipped = f" ({receipt['documents_skipped']:,} skipped)" if receipt["documents_skipped"] else ""
    scored = f", of which {receipt['scored_tokens']:,} ({receipt['scored_share']:.1%}) are scored"
    documents, tokens = counted(receipt["documents"], "document"), counted(receipt["tokens"], "token")
    return f"{output}: {documents}{skipped}, {tokens}" + (scored if receipt["has_mask"] else "")


def warnings(receipt: dict[str, Any]) -> list[str]:
    """Return a line for each kind of document that is left out or not learnt from, with the place of the first."""
    kept, unscored = receipt["documents"], receipt["documents_unscored"]
    lines = [
        (
            receipt["documents_skipped"],
            "document",
            f"of fewer than {receipt['min_tokens']} tokens (--min-tokens) left out; the first is "
            f"{receipt['first_skipped']}.",
        ),
        (
            receipt["documents_blank"],
            "record",
            f"without text left out; the first is {receipt['first_blank']}.",
        ),
        (
            unscored,
            "",
            f"of {kept:,} documents have no scored text, so nothing is learnt from them: {_reason(receipt)}; the first "
            f"is {receipt['first_unscored']}.",
        ),
    ]
    return [f"{counted(number, noun) if noun else f'{number:,}'} {line}" for number, noun, line in lines if number]


def _reason(receipt: dict[str, Any]) -> str:
    if receipt["messages_key"] is not None:
        return f"no turn of role {SCORED_ROLE!r} that has text and not the weight 0"
    return f"their --completion-key {receipt['completion_key']} is empty"
