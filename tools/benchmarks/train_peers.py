"""Shared code of the training benchmark's peers: arguments, samples, and rows in megaft's format."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_case import SEED, Case

from megaft.base import parallel
from megaft.data.indexed import TokenFile
from megaft.run.metrics import MetricsFile, PendingRows
from megaft.run.throughput import peak_memory_bytes
from megaft.weights.loading.pretrained import create_language_model


def arguments() -> tuple[Case, Path, Path]:
    """Return the case, the folder with its inputs and the run's folder, from the command line."""
    folder, run_dir = map(Path, sys.argv[1:3])
    return Case.read(folder), folder, run_dir


def new_model(folder: Path) -> Any:
    """Return transformers' model in fp32 with sdpa attention and megaft's initial weights."""
    return create_language_model(str(folder / "model"), SEED)


class Windows(torch.utils.data.Dataset):
    """Prepared tokens, split every context_length."""

    def __init__(self, folder: Path, context_length: int) -> None:
        self._tokens = TokenFile(folder / "train")
        self._length = context_length

    def __len__(self) -> int:
        return self._tokens.num_tokens // self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = index * self._length
        ids = torch.from_numpy(self._tokens.read(begin, begin + self._length).astype("int64"))
        labels = ids.clone()
        labels[0] = -100  # nothing predicts it, yet the Trainer would count it: its loss came out 63/64 of megaft's
        return {"input_ids": ids, "labels": labels}


class Recorder:
    """Writer of RUN/metrics.jsonl with megaft's clock, which does not wait for the device."""

    def __init__(self, run_dir: Path, device: torch.device) -> None:
        """Start the clock of the first step."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = MetricsFile(run_dir / "metrics.jsonl", 0) if parallel.is_main() else None
        self._device = device
        self._loss = torch.zeros((), device=device)
        self._pending = PendingRows(device)

    def add(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the step's loss on this rank."""
        self._loss = self._loss + loss.detach()

    def step(self, step: int) -> None:
        """End an optimizer step, counted from 1."""
        loss = parallel.sum_over_data_ranks(self._loss) / parallel.data_parallel_size()
        self._log(self._pending.push({"step": step, "loss": loss}))
        self._loss = torch.zeros((), device=self._device)

    def close(self) -> None:
        """Write the last row."""
        self._log(self._pending.drain())

    def _log(self, rows: list[dict]) -> None:
        if self._file is not None:
            for row in rows:
                self._file.log(row | {"peak_memory_bytes": peak_memory_bytes(self._device)})
