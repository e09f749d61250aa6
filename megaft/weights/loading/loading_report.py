"""Raise the errors of transformers' loading report in one line, in place of its table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import modeling_utils

from megaft.weights.loading.replaced import replaced


@contextmanager
def without_report_table() -> Iterator[None]:
    """Log no table of missing and unexpected weights, which `require_complete` refuses by name.

    Raises:
        RuntimeError: Stored weights could not be converted to the parameters of the family.
    """
    with replaced(modeling_utils, "log_state_dict_report", _raise_conversion_errors):
        yield


def _raise_conversion_errors(*_: Any, loading_info: Any, **__: Any) -> None:
    for name, reason in loading_info.conversion_errors.items():
        said = ["", *reason.strip().splitlines()]  # a traceback, its message, and the names of the tensors
        raise RuntimeError(f"{name} cannot be made of the stored weights: {said[-2]}")
    if loading_info.error_msgs:
        raise RuntimeError("; ".join(" ".join(reason.split()) for reason in loading_info.error_msgs))
