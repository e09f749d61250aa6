"""Errors of transformers and torch for a config.json, in one line."""

from __future__ import annotations

from typing import Any

PADDING = "Padding_idx must be within num_embeddings"
"""torch's message for a pad_token_id outside the vocabulary, in families that have a padding row."""


def padding_rule(error: Exception, config: Any) -> str | None:
    """Return the rule that a transformers configuration breaks with its pad_token_id, if that is the error."""
    if PADDING not in str(error):
        return None
    text = config.get_text_config()
    return (
        f"its pad_token_id is {text.pad_token_id}, which must be null or below vocab_size ({text.vocab_size}) in this "
        "family, as it has a padding row; set it to null in a copy of config.json"
    )


def first_line(error: Exception, config: Any = None) -> str:
    """Return an error in one line; `config` is the configuration, where transformers could read it."""
    if rule := padding_rule(error, config):
        return rule
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first
