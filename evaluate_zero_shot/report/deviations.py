"""Deviations of a result from its task and protocol, which make it incomparable with published results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts.known_files import KNOWN, SPLITS, TEXTS

Result = Mapping[str, Any]
"""Entry of results.json."""
UNKNOWN_FILE = "unknown file"


def is_user_text(result: Result) -> bool:
    """Return True if the task scores a text of the user's own, not a published file."""
    return TASKS[result["task"]].files is None


def deviations(result: Result) -> tuple[str, ...]:
    """Return the deviations of a result from the definitions of its protocol and task."""
    limit, split = result["limit_lines"], SPLITS.get(result["data_name"], "test")
    return (
        *([UNKNOWN_FILE] if result["data_name"] is None and not is_user_text(result) else []),
        *([] if split == "test" else [f"{split} set, not the test set"]),
        *(["not the protocol's text"] if _is_other_text(result) else []),
        *([f"first {limit:,} lines only"] if limit is not None else []),
        *([] if result["is_protocol_default"] else ["not the protocol's own context or stride"]),
    )


def _is_other_text(result: Result) -> bool:
    """Return True if the raw file was scored but the protocol asks for the word-tokenized one, or the reverse."""
    if TASKS[result["task"]].raw_files is None or result["data_name"] not in TEXTS:
        return False
    return TEXTS[result["data_name"]] != PROTOCOLS[result["protocol"]].file_text


def note_on_comparison(result: Result) -> str | None:
    """Return a line for the terminal if a result is not comparable with published ones, in the report's words.

    There is no note on a text of the user's own, for which nothing is published.
    """
    texts = deviations(result)
    if not texts or is_user_text(result):
        return None
    reasons = (_unknown_file(result) if text == UNKNOWN_FILE else text for text in texts)
    return f"warning: not comparable with published results: {'; '.join(reasons)}"


def _unknown_file(result: Result) -> str:
    count = "" if result["num_words"] is None else f" ({result['num_words']:,} words)"
    known = " or ".join(f"{name} ({sha256[:8]})" for sha256, name in _expected_files(result).items())
    published = f"not that of {known}" if known else "and no hash of the published file is known"
    return f"{UNKNOWN_FILE}, {result['data_file']}{count} has SHA-256 {result['data_sha256'][:8]}, {published}"


def _expected_files(result: Result) -> dict[str, str]:
    """Return names of the published test files of a result's task and protocol, by SHA-256; none if not known."""
    has_raw, text = TASKS[result["task"]].raw_files is not None, PROTOCOLS[result["protocol"]].file_text
    return {
        sha256: file.name
        for sha256, file in KNOWN.items()
        if result["task"] in file.tasks and file.split == "test" and (file.text == text or not has_raw)
    }
