"""Report on a prepared dataset: size, share of scored tokens, and documents that are skipped or unscored."""

from __future__ import annotations

from typing import Any

from megaft.base.plural import counted
from megaft.data.chat import SCORED_ROLE


def summary(output: object, receipt: dict[str, Any]) -> str:
    """Return a line with the number of documents and tokens."""
    skipped = f" ({receipt['documents_skipped']:,} skipped)" if receipt["documents_skipped"] else ""
    scored = f", of which {receipt['scored_tokens']:,} ({receipt['scored_share']:.1%}) are scored"
    documents, tokens = counted(receipt["documents"], "document"), counted(receipt["tokens"], "token")
    return f"{output}: {documents}{skipped}, {tokens}" + (scored if receipt["has_mask"] else "")


def warnings(receipt: dict[str, Any]) -> list[str]:
    """Return a warning for each kind of skipped or unscored document, with the location of the first."""
    lines = []
    if skipped := receipt["documents_skipped"]:
        lines.append(
            f"{counted(skipped, 'document')} of fewer than {receipt['min_tokens']} tokens (--min-tokens) left out; the "
            f"first is {receipt['first_skipped']}."
        )
    if blank := receipt["documents_blank"]:
        lines.append(f"{counted(blank, 'record')} without text left out; the first is {receipt['first_blank']}.")
    if unscored := receipt["documents_unscored"]:
        lines.append(
            f"{unscored:,} of {receipt['documents']:,} documents have no scored text, so the model learns nothing from "
            f"them: {_reason(receipt)}; the first is {receipt['first_unscored']}."
        )
    return lines


def _reason(receipt: dict[str, Any]) -> str:
    if receipt["messages_key"] is not None:
        return f"no turn of role {SCORED_ROLE!r} has text and a weight other than 0"
    return f"their --completion-key {receipt['completion_key']} is empty"
