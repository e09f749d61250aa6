"""Redact secrets, and the folders of this machine, from files meant for sharing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from megaft.base.nested import mapped

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
MIN_SECRET_LENGTH = 8
"""Minimum length of a secret: a shorter one might occur inside ordinary words."""
_PARENT_FOLDERS = re.compile(r"(?<![\w.~:/-])/(?:[^\s/:,;()'\"]+/)*(?=[^\s/:,;()'\"])")
"""Everything before the last component of an absolute path."""


def without_secrets(text: str) -> str:
    """Return the text with passwords in URLs, and values of secret environment variables, replaced by ***."""
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_LENGTH:
            text = text.replace(value, "***")
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def without_folders(text: str) -> str:
    """Return the text with each absolute path cut to its last component, and the name of the home folder removed.

    URLs, hub names and relative paths stay as they are.
    """
    return _PARENT_FOLDERS.sub("", text.replace(f"{Path.home()}{os.sep}", os.sep))


def without_parents(argument: str) -> str:
    """Return a path, or a flag with one, with an absolute path cut to its last component.

    A run's model, RUN/export, keeps the name of its run. Relative paths and hub names stay as they are.
    """
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    name = f"{path.parent.name}/{path.name}" if path.name == "export" and path.parent.name else path.name
    return f"{flag}{equals}{name}"


def redacted(value: Any) -> Any:
    """Return nested settings with secrets redacted in every text and path; paths become texts."""
    return mapped(value, lambda item: without_secrets(os.fspath(item)) if isinstance(item, str | os.PathLike) else item)
