"""Operations for whose results the host would wait on a GPU: they show on CPUs too, where nothing waits.

They read a tensor's value, or return a shape that depends on it.
"""

import sys

WAITING = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_consecutive"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def waits(name, arguments):
    """Return True if the host waits for the result of an operation."""
    import torch

    if name in INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    return name in WAITING


def caller():
    """Return the file and function of the innermost named function outside of torch that runs an operation.

    To be called by `__torch_dispatch__`.
    """
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_name.startswith("<"):
        frame = frame.f_back
        assert frame is not None
    path = frame.f_code.co_filename.split("site-packages/")[-1]
    return path[path.rfind("megaft/") :] if "/megaft/" in path else path, frame.f_code.co_name
