"""Throughput of a run: tokens per second, model FLOPs utilization, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from megaft.base import parallel
from megaft.base.half_precision import product_dtype
from megaft.base.hardware import data_sheet_flops
from megaft.config.train import MetricsConfig
from megaft.models.parameters import count
from megaft.weights.dimensions import flops_per_token

MEASURING_SECONDS = 0.3
MIN_TRUSTED_SIZE = 512
"""Smallest matrix size for the measurement; smaller products are too short to time reliably."""
PRODUCTS = 3
"""Products per size, of which the fastest counts: other programs only make a product slower."""


def peak_flops(device: torch.device, dtype: torch.dtype, setting: float | None = None) -> tuple[float, str]:
    """Return the device's peak in FLOP/s for matrices of `dtype`, and its source.

    The source is `setting` (--metrics.peak-flops), the data sheet of a known GPU in half precision, or a measurement.
    """
    if setting is not None:
        return setting, "metrics.peak-flops"
    if device.type == "cuda" and _has_tensor_cores_for(device, dtype):
        name = torch.cuda.get_device_name(device)
        if (known := data_sheet_flops(name)) is not None:
            return known, f"data sheet of {name}"
    multiplied = product_dtype(dtype, device)
    return measured_flops(device, multiplied), f"measured by multiplying {multiplied} matrices on this {device.type}"


def _has_tensor_cores_for(device: torch.device, dtype: torch.dtype) -> bool:
    bf16_from = (8, 0)
    return dtype == torch.float16 or (dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= bf16_from)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of square products of growing size, within about 0.3 s."""
    best, size, begin = 0.0, 256, time.perf_counter()
    while size <= 8192:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        _seconds_of_product(matrix)  # the first one also loads kernels
        seconds = min(_seconds_of_product(matrix) for _ in range(PRODUCTS))
        best = max(best, 2 * size**3 / seconds)
        spent = time.perf_counter() - begin
        if size >= MIN_TRUSTED_SIZE and spent + (PRODUCTS + 1) * 8 * seconds > MEASURING_SECONDS:  # the next size's
            break
        size *= 2
    return best


def _seconds_of_product(matrix: torch.Tensor) -> float:
    before = DeviceTimestamp(matrix.device)
    torch.matmul(matrix, matrix)
    return DeviceTimestamp(matrix.device).seconds_since(before)


class DeviceTimestamp:
    """Timestamp of the device: a CUDA event on the current stream, or the time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._time = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: DeviceTimestamp) -> float:
        """Wait until the device reaches this timestamp; return the seconds since the earlier one."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank: allocated by torch on CUDA, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Meter:
    """Converter of a step's tokens and seconds into throughput and MFU."""

    device: torch.device
    num_devices: int
    flops_per_token: float | None
    """None if the architecture is unknown, so that MFU is unknown too."""
    peak_flops: float
    """Peak FLOP/s of one device."""
    peak_source: str
    """Source of `peak_flops`: setting, data sheet or measurement."""

    @classmethod
    def of(
        cls,
        architecture: Any,
        model: torch.nn.Module,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        config: MetricsConfig,
    ) -> Meter:
        """Return the meter of a model that trains in `dtype` on as many devices as there are ranks.

        Args:
            architecture: The transformers config.
            model: Its parameters are counted once where tied, and whole where ZeRO-3 has partitioned them.
        """
        flops = None
        if hasattr(architecture, "num_hidden_layers") and hasattr(architecture, "hidden_size"):
            num_parameters = count(model.parameters())
            shape = architecture.num_hidden_layers, architecture.hidden_size
            flops = flops_per_token(num_parameters, *shape, context_length)
        peak, source = peak_flops(device, dtype, config.peak_flops)
        return cls(
            device=device,
            num_devices=parallel.world_size(),
            flops_per_token=flops,
            peak_flops=peak,
            peak_source=source,
        )

    def rates(self, tokens: int, seconds: float) -> dict[str, float | int | None]:
        """Return the rates of a step that put `tokens` through all devices, and the peak memory so far.

        `mfu` is model FLOPs utilization (PaLM, appendix B): the FLOP/s of the model over the peak of all devices. It
        is None instead of a value above 1, which means a wrong peak, such as one measured while other processes used
        the cores.
        """
        per_device = tokens / seconds / self.num_devices
        share = None if self.flops_per_token is None else per_device * self.flops_per_token / self.peak_flops
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": per_device,
            "mfu": None if share is None or share > 1 else share,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
