"""Metrics of a run, written by the main rank: RUN/metrics.jsonl, the terminal, and trackers on request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from megaft.base.files import naming_disk_errors, replacing, step_rows, to_json
from megaft.config.train import MetricsConfig
from megaft.run.terminal import Terminal
from megaft.run.throughput import DeviceTimestamp, Meter
from megaft.run.trackers import check_trackers, open_trackers

Row = dict[str, Any]


class MetricsFile:
    """JSON Lines file of metrics: one row per step, in order.

    A row's `step` counts optimizer steps done, from 1. Values that are not finite are the strings "nan", "inf", "-inf".
    """

    def __init__(self, path: Path, first_step: int) -> None:
        """Open the file after `first_step` steps; after 0 steps it starts empty.

        Rows of later steps from an earlier attempt are dropped, and so is a line truncated by a crash.

        Raises:
            ConfigError: The file cannot be written.
        """
        self._path = path
        self._open(first_step)

    def _open(self, step: int) -> None:
        with replacing(self._path) as new:
            if step > 0 and self._path.exists():
                new.writelines(to_json(row) + "\n" for row in step_rows(self._path) if row["step"] <= step)
        with naming_disk_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`."""
        self.close()
        self._open(step)

    def log(self, row: Row) -> None:
        """Append a row and flush it."""
        with naming_disk_errors(self._path):
            self._file.write(to_json(row) + "\n")
            self._file.flush()

    def close(self, failed: bool = False) -> None:
        """Close the file; `failed` is part of the sinks' interface and has no effect."""
        with naming_disk_errors(self._path):
            self._file.close()


class PendingRows:
    """Metrics rows whose values are still being computed on the device.

    Reading a CUDA tensor waits for all that is queued, the step just launched included, and the GPU then idles until
    the next launch. So `push` queues a copy to pinned memory behind the step and returns the previous step's row,
    whose copy has finished by then. On CPU a row is ready at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._waiting: list[tuple[Row, DeviceTimestamp]] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Start timing the next row."""
        assert not self._waiting, "drain before restarting the clock"
        self._last = DeviceTimestamp(self._device)

    def push(self, row: Row) -> list[Row]:
        """Add a row of numbers or 0-dim tensors; return the rows that are complete.

        A complete row holds plain numbers, and `seconds` since the row before it or `start_clock`.
        """
        copies = {name: _copy_to_host(value) if isinstance(value, Tensor) else value for name, value in row.items()}
        self._waiting.append((copies, DeviceTimestamp(self._device)))
        return self._take(len(self._waiting) - (self._device.type == "cuda"))

    def drain(self) -> list[Row]:
        """Wait for the device and return the remaining rows."""
        return self._take(len(self._waiting))

    def _take(self, count: int) -> list[Row]:
        return [self._complete(*self._waiting.pop(0)) for _ in range(count)]

    def _complete(self, row: Row, mark: DeviceTimestamp) -> Row:
        seconds = mark.seconds_since(self._last)
        self._last = mark
        numbers = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
        return numbers | {"seconds": seconds}


def _copy_to_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", non_blocking=True, copy=True)


class Metrics:
    """Metrics of the training loop. Every rank creates one, with the same arguments except `is_main`."""

    def __init__(
        self,
        run_dir: Path,
        config: MetricsConfig,
        *,
        first_step: int,
        max_steps: int,
        is_main: bool,
        meter: Meter,
        settings: dict[str, Any],
    ) -> None:
        """Open the file, the terminal and the trackers, for a run that has done `first_step` steps.

        Args:
            run_dir: Created if it does not exist.
            settings: The resolved config, shown by the trackers.

        Raises:
            ConfigError: A tracker's package is missing (on every rank alike), or the file cannot be written.
        """
        check_trackers(config)
        self._meter = meter
        self._pending = PendingRows(meter.device)
        self._sinks, self._file = [], None
        if is_main:
            with naming_disk_errors(run_dir):
                run_dir.mkdir(parents=True, exist_ok=True)
            self._file = MetricsFile(run_dir / "metrics.jsonl", first_step)
            self._sinks = [
                self._file,
                open_trackers(config, run_dir, settings, first_step),
                Terminal(first_step, max_steps),
            ]
        self._pending.start_clock()

    def step(
        self,
        step: int,
        *,
        loss: Float[Tensor, ""] | float,
        grad_norm: Float[Tensor, ""] | float | None,
        learning_rate: float,
        tokens_seen: Int64[Tensor, ""] | int,
        tokens: Int64[Tensor, ""] | int,
        skipped_steps: int = 0,
        loss_scale: float | None = None,
    ) -> list[Row]:
        """Report an optimizer step without waiting for it.

        Args:
            step: Optimizer steps done, this one included.
            loss: Nats per scored token of the global batch.
            grad_norm: Gradient norm before clipping; None if unknown.
            tokens_seen: Scored tokens trained on so far, over data ranks.
            tokens: Input tokens of this step's global batch, scored or not but without padding: what throughput counts.
            skipped_steps: Steps whose update DeepSpeed (non-finite gradient, such as an fp16 overflow) or the guard's
                `skip` discarded.
            loss_scale: Loss scale of this step; None without fp16.

        Returns:
            The rows that are complete now, on every rank: on CUDA that of the step before.
        """
        row = {"step": step, "loss": loss, "tokens_seen": tokens_seen, "learning_rate": learning_rate}
        row |= {"grad_norm": grad_norm, "skipped_steps": skipped_steps, "tokens": tokens}
        row |= {} if loss_scale is None else {"loss_scale": loss_scale}
        return self._log(self._pending.push(row))

    def validation(self, step: int, values: Row) -> None:
        """Report a validation after `step` optimizer steps."""
        self.drain()
        for sink in self._sinks:
            sink.log({"step": step, "validation": values})

    def drain(self) -> list[Row]:
        """Wait for the device and report the remaining steps; return their rows."""
        return self._log(self._pending.drain())

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the block (validation, saving) from the throughput; steps before it are reported."""
        self.drain()
        yield
        self._pending.start_clock()

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`; trackers keep them until these steps are logged again."""
        self.drain()
        self._pending.start_clock()
        if self._file:
            self._file.rewind(step)

    def close(self, failed: bool = False) -> None:
        """Report the remaining steps and close all outputs; trackers are told whether the run failed.

        After a failure nothing more is reported, since the device may wait for lost ranks.
        """
        try:
            if not failed:
                self.drain()
        finally:
            for sink in self._sinks:
                sink.close(failed)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def _log(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            row |= self._meter.rates(row.pop("tokens"), row["seconds"])
            for sink in self._sinks:
                sink.log(row)
        return rows
