"""Redact secrets, and the folders of this machine, from what others read: events, model cards and reports."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from megaft.base.nested import mapped

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
LEAST_LENGTH = 8
"""Least length of a secret: a shorter one would be found in ordinary words."""
_FOLDERS = re.compile(r"(?<![\w.~:/-])/(?:[^\s/:,;()'\"]+/)*(?=[^\s/:,;()'\"])")
"""Root and folders of an absolute path, up to its last part."""


def without_secrets(text: str) -> str:
    """Return the text without the password of a URL and without the value of any secret environment variable."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= LEAST_LENGTH:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def without_folders(text: str) -> str:
    """Return the text with each absolute path cut to its last part, and the home folder's name left out.

    URLs, hub names and relative paths stay as they are.
    """
    return _FOLDERS.sub("", text.replace(f"{Path.home()}{os.sep}", os.sep))


def masked(value: Any) -> Any:
    """Return settings, nested as they are, with every text and path without secrets."""
    return mapped(value, lambda item: without_secrets(os.fspath(item)) if isinstance(item, str | os.PathLike) else item)
