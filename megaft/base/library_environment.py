"""Environment variables that libraries read once, so a program sets them before its slow imports."""

from __future__ import annotations

import os

LIBRARY_ENVIRONMENT = {
    "TQDM_DISABLE": "1",  # else libraries draw progress bars, on every rank
    # torch's tensors on CPUs get huge pages where Linux allows it (transparent_hugepage is "always" or "madvise"): each
    # step of training frees and touches gigabytes, and 2 MiB at a time cost fewer page faults than 4 KiB.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def set_library_environment() -> None:
    """Set these variables, except those that the user has set."""
    for name, value in LIBRARY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
