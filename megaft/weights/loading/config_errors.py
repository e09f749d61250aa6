"""One-line messages for errors of transformers and torch about a config.json."""

from __future__ import annotations

from typing import Any

PADDING = "Padding_idx must be within num_embeddings"
"""torch's message for a pad_token_id outside the vocabulary, in families that have a padding row."""


def padding_rule(error: Exception, config: Any) -> str | None:
    """Return the rule that the configuration's pad_token_id breaks, if that caused the error."""
    if PADDING not in str(error):
        return None
    text = config.get_text_config()
    return (
        f"its pad_token_id is {text.pad_token_id}; in this family, which has a padding row, it must be null or less "
        f"than vocab_size ({text.vocab_size}). Set it to null in a copy of config.json"
    )


def first_line(error: Exception, config: Any = None) -> str:
    """Return an error's message as one line; `config` is the configuration, if transformers could read it."""
    if rule := padding_rule(error, config):
        return rule
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
