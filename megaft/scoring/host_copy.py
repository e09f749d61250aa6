"""Copy of a tensor in host memory, for which the host waits as late as possible."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor


class HostCopy:
    """A copy that is queued on the device behind the kernels that compute the tensor; on CPU the tensor itself."""

    def __init__(self, tensor: Float32[Tensor, ...]) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)  # pinned, if it comes from a GPU
        self._event = None
        if tensor.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Float32[np.ndarray, ...]:
        """Wait for the copy and return it."""
        if self._event is not None:
            self._event.synchronize()
        return self._copy.numpy()
