"""Files: JSON, file names, hashes and atomic writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megaft.base.errors import ConfigError, DataError, UserError
from megaft.base.nested import mapped
from megaft.base.unicode_text import is_unicode


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """Return the value of a JSON text, as json.loads with its hooks.

    Raises:
        JSONDecodeError: Invalid JSON, nesting too deep, or an integer too long for Python.
        UnicodeDecodeError: The bytes are not UTF-8.
    """
    try:
        return json.loads(text, **hooks)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except RecursionError as error:
        raise json.JSONDecodeError("lists or objects are nested too deeply", "", 0) from error
    except ValueError as error:
        raise json.JSONDecodeError("an integer has thousands of digits; write it as a string", "", 0) from error


def read_json(path: Path) -> Any:
    """Return the value of a JSON file from an untrusted source.

    Raises:
        DataError: The file is not JSON.
        OSError: The file cannot be read.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged: it is not JSON ({error}); copy it again.") from error


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as strict JSON, with every digit of a float.

    JSON has no NaN: a float that is not finite becomes the string "nan", "inf" or "-inf", which `float()` reads back.
    A path becomes its text.

    Raises:
        TypeError: A value has no JSON type, such as a tensor.
    """
    return json.dumps(mapped(value, _finite), indent=indent, default=os.fspath, allow_nan=False)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def naming_disk_errors(
    path: Path, kind: type[UserError] = ConfigError, fix: str = "Free space there or choose another folder."
) -> Iterator[None]:
    """Turn disk errors in the block (full, read-only, no permission) into a `kind` that names `path`."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path} cannot be written: {error.strerror or error}. {fix}") from error


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries (such as a renamed file), are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Write a file atomically: open a temporary file that replaces `path` when the block ends, unless it raises.

    A lone surrogate, as in file names that are not UTF-8, is written as its escape.

    Raises:
        ConfigError: The file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with naming_disk_errors(path):
        try:
            with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            fsync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


MAX_NAME_BYTES = 255
"""Maximum bytes of a file name."""


def is_file_name(name: str) -> bool:
    """Return True if an untrusted text is a plain file name, without a folder."""
    is_plain = Path(name).name == name and name not in ("", "..") and "\0" not in name
    return is_plain and is_unicode(name) and len(name.encode()) <= MAX_NAME_BYTES


def step_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl or events.jsonl: objects with an integer `step`.

    Other lines are left out, such as one truncated by a crash.
    """
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = parse_json(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield row


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_atomic(path: Path, value: Any) -> None:
    """Write `value` atomically as indented JSON (see `to_json`): readers see the old file or the new one."""
    with replacing(path) as file:
        file.write(to_json(value, indent=2) + "\n")
