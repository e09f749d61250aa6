"""Files of a model or tokenizer: in its folder, or in the cache of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path


def find_file(source: str | Path, name: str) -> Path | None:
    """Return a file of a model's folder or hub repository; None where it has none, or nobody can be asked.

    Args:
        source: A folder or a hub name.
        name: The file's, such as config.json.

    Raises:
        OSError: There can be no such model: transformers says why.
    """
    from transformers.utils import cached_file

    silenced = ("gated_repo", "missing_entries", "connection_errors")
    found = cached_file(str(source), name, **{f"_raise_exceptions_for_{what}": False for what in silenced})
    return None if found is None else Path(found)


def find_file_if_any(source: str | Path, name: str) -> Path | None:
    """Return `find_file`'s, and None too where there can be no such model: loading it says so."""
    try:
        return find_file(source, name)
    except OSError:
        return None
