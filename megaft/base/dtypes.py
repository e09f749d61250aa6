"""Names of torch's dtypes."""

from __future__ import annotations

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as flags and reports give it, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
