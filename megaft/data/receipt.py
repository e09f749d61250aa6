"""Receipt of a prepared dataset, PREFIX.json: written last, so a dataset without it is incomplete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megaft.base.errors import DataError
from megaft.base.files import fsync, parse_json, write_json_atomic
from megaft.base.lock import locked
from megaft.base.redaction import redacted
from megaft.data.indexed import idx_bytes, with_suffix
from megaft.data.receipt_fields import fault_of

FORMAT_VERSION = 1
SUFFIXES = (".bin", ".idx", ".scored.bin", ".scored.idx")


def is_prepared(prefix: str) -> bool:
    """Return True if a prepared dataset has this prefix."""
    return Path(f"{prefix}.json").is_file() and Path(f"{prefix}.idx").is_file()


def load_receipt(prefix: str | Path) -> dict[str, Any]:
    """Return the receipt of a prepared dataset, after checking that all files exist and have its sizes.

    Raises:
        DataError: There is no receipt (never prepared, or interrupted), or a file does not match it.
    """
    path = with_suffix(prefix, ".json")
    try:
        receipt = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{prefix} is not a prepared dataset: {path} cannot be read. Run megaft prepare.") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); run megaft prepare again.") from error
    if not isinstance(receipt, dict) or receipt.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{path} is not a receipt of format version {FORMAT_VERSION}; run megaft prepare again.")
    if fault := fault_of(receipt):
        raise DataError(f"{path} {fault}. Run megaft prepare again, or copy the dataset again.")
    for suffix, num_bytes in _file_bytes(receipt).items():
        _check_length(with_suffix(prefix, suffix), num_bytes)
    return receipt


def _file_bytes(receipt: dict[str, Any]) -> dict[str, int]:
    data, idx = receipt["tokens"] * np.dtype(receipt["dtype"]).itemsize, idx_bytes(receipt["documents"])
    mask = {".scored.bin": receipt["tokens"], ".scored.idx": idx} if receipt["has_mask"] else {}
    return {".bin": data, ".idx": idx, **mask}


def _check_length(path: Path, expected: int) -> None:
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        state = "is missing" if actual is None else f"has {actual:,} bytes"
        raise DataError(f"{path} {state}; its receipt says {expected:,} bytes. Run megaft prepare again.")


def temporary(prefix: Path, suffix: str) -> Path:
    """Return the temporary path of a file before publication."""
    return with_suffix(prefix, f"{suffix}.tmp")


@contextmanager
def publishing(prefix: Path) -> Iterator[None]:
    """Lock the prefix against other writers, and remove temporary files after a failure.

    Raises:
        ConfigError: Another process is writing it.
    """
    with locked(prefix, file=with_suffix(prefix, ".lock")):
        try:
            yield
        finally:
            for suffix in SUFFIXES:
                temporary(prefix, suffix).unlink(missing_ok=True)


def publish(prefix: Path, receipt: dict[str, Any]) -> None:
    """Replace any older dataset: remove its receipt, rename the temporary files, then write the new receipt."""
    with_suffix(prefix, ".json").unlink(missing_ok=True)
    fsync(prefix.parent)
    for suffix in SUFFIXES:
        if temporary(prefix, suffix).exists():
            temporary(prefix, suffix).replace(with_suffix(prefix, suffix))
        else:
            with_suffix(prefix, suffix).unlink(missing_ok=True)
    write_json_atomic(with_suffix(prefix, ".json"), redacted(receipt))
