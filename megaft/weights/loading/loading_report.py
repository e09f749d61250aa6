"""Raise the errors in transformers' loading report as one line instead of printing its table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_utils

from megaft.weights.loading.replaced import replaced


@contextmanager
def without_report_table() -> Iterator[None]:
    """Suppress the table of missing and unexpected weights, which `require_complete` refuses by name.

    Raises:
        RuntimeError: Stored weights cannot be converted to the family's parameters.
    """
    with replaced(modeling_utils, "log_state_dict_report", _raise_conversion_errors):
        yield


def _raise_conversion_errors(*_: Any, loading_info: Any, **__: Any) -> None:
    for name, reason in loading_info.conversion_errors.items():
        lines = ["", *reason.strip().splitlines()]  # a traceback, its message, and the names of the tensors
        raise RuntimeError(f"{name} cannot be converted from the stored weights: {lines[-2]}")
    if loading_info.error_msgs:
        raise RuntimeError("; ".join(" ".join(reason.split()) for reason in loading_info.error_msgs))
