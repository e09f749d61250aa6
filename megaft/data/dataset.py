"""A prepared dataset: the files of one prefix and their receipt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megaft.data.receipt import load_receipt


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, named by its prefix; equal prefixes are the same dataset."""

    prefix: str

    @cached_property
    def receipt(self) -> dict[str, Any]:
        """The receipt, read and validated on first access.

        Raises:
            DataError: As `load_receipt`.
        """
        return load_receipt(self.prefix)
