"""Redact secrets from logs, events and reports."""

from __future__ import annotations

import os
import re
from typing import Any

from megaft.base.nested import mapped

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
LEAST_LENGTH = 8
"""Least length of a secret: a shorter one would be found in ordinary words."""


def without_secrets(text: str) -> str:
    """Return the text without the password of a URL and without the value of any secret environment variable."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= LEAST_LENGTH:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def masked(value: Any) -> Any:
    """Return settings, nested as they are, with every text and path without secrets."""
    return mapped(value, lambda item: without_secrets(os.fspath(item)) if isinstance(item, str | os.PathLike) else item)
