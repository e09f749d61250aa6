"""Validation of the fields of a receipt, which users may have edited or an older version may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MAX_SHOWN = 80
_MISSING = object()


@dataclass(frozen=True, slots=True)
class _Rule:
    """Rule for the value of a field, as text for messages and as a predicate."""

    text: str
    holds: Callable[[Any], bool]
    is_required: bool = True


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


def _is_list(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _one_of(*names: str) -> _Rule:
    return _Rule(f"one of {', '.join(names)}", lambda value: value in names)


def _is_source(value: object) -> bool:
    return isinstance(value, dict) and _is_string(value.get("path")) and _is_sha256(value.get("sha256"))


_COUNT = _Rule("an integer of 0 or more", _is_count)
_FLAG = _Rule("true or false", _is_flag)
_SHA256 = _Rule("64 hexadecimal digits", _is_sha256)
_STRING = _Rule("a string", _is_string)
_STRING_OR_NULL = _Rule("a string or null", _or_null(_is_string))
_ID_OR_NULL = _Rule("a token id of the vocabulary, or null", _or_null(_is_count))
_IDS = _Rule("a list of token ids of the vocabulary", _is_list(_is_count), is_required=False)


def _optional(rule: _Rule) -> _Rule:
    return _Rule(rule.text, rule.holds, is_required=False)


_RULES = {
    "tokenizer": _Rule("an object", lambda value: isinstance(value, dict)),
    "tokenizer.source": _STRING,
    "tokenizer.sha256": _SHA256,
    "tokenizer.vocab_size": _Rule("an integer of 1 or more", lambda value: _is_count(value) and value > 0),
    "tokenizer.round_trip": _FLAG,
    "documents": _COUNT,
    "tokens": _COUNT,
    "words": _COUNT,
    "bytes": _COUNT,
    "dtype": _one_of("uint8", "int8", "int16", "int32", "int64", "uint16"),
    "has_mask": _FLAG,
    "bin_sha256": _SHA256,
    "eod_id": _ID_OR_NULL,
    "messages_key": _STRING_OR_NULL,
    # Optional: older versions did not write them, or they only describe the preparation.
    "opening_ids": _IDS,
    "chat_template_sha256": _optional(_Rule("64 hexadecimal digits or null", _or_null(_is_sha256))),
    "sources": _Rule("a list of objects, each with path and sha256", _is_list(_is_source), is_required=False),
    **dict.fromkeys(("documents_skipped", "documents_unscored", "documents_blank", "scored_tokens"), _optional(_COUNT)),
    **dict.fromkeys(("byte_order_marks", "crlfs", "min_tokens"), _optional(_COUNT)),
    **dict.fromkeys(("prompt_key", "completion_key", "json_key", "unit"), _optional(_STRING_OR_NULL)),
    **dict.fromkeys(("detokenizer", "format", "words_and_bytes_of"), _optional(_STRING)),
    "scored_share": _Rule("a number from 0 to 1", _is_fraction, is_required=False),
    "control_codes": _Rule("a list of strings", _is_list(_is_string), is_required=False),
}


def fault_of(receipt: Mapping[str, Any]) -> str | None:
    """Return a message about the first field that breaks its rule, without the file's name; None if all are valid."""
    for field, rule in _RULES.items():
        value = _value(receipt, field)
        if value is _MISSING and rule.is_required:
            return f"has no {field}, which must be {rule.text}"
        if value is not _MISSING and not rule.holds(value):
            return _violation(field, value, rule.text)
    return _contradiction(receipt)


def _contradiction(receipt: Mapping[str, Any]) -> str | None:
    """Return a message about the first field whose value contradicts another field's; None if there is none."""
    vocab_size = receipt["tokenizer"]["vocab_size"]
    for field in ("eod_id", "opening_ids"):
        value = receipt.get(field)
        if any(id_ >= vocab_size for id_ in (value if isinstance(value, list) else [value or 0])):
            return _violation(field, value, f"below tokenizer.vocab_size, {vocab_size:,}")
    for field, limit in (("scored_tokens", "tokens"), ("words", "bytes")):
        if (value := receipt.get(field, 0)) > receipt[limit]:
            return _violation(field, value, f"at most {limit}, {receipt[limit]:,}")
    return None


def _violation(field: str, value: Any, rule: str) -> str:
    return f"has the {field} {json.dumps(value)[:_MAX_SHOWN]}; it must be {rule}"


def _value(receipt: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field, `outer.inner` for one of a nested object, or _MISSING."""
    outer, _, inner = field.partition(".")
    value = receipt.get(outer, _MISSING)
    return value.get(inner, _MISSING) if inner and isinstance(value, dict) else value
