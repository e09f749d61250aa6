"""One rank of the checkpoint benchmark, which saves the same engine in every way, alternating.

torchrun --nproc-per-node 2 checkpoint_cost_ranks.py OUTPUT.json FOLDER STAGE MILLIONS_OF_PARAMETERS REPEATS
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megaft.base import parallel
from megaft.base.files import fsync, sha256_of
from megaft.checkpoint.run_state import Identity, RunState
from megaft.checkpoint.saver import Saver
from megaft.config.train import CheckpointConfig, OptimConfig
from megaft.models.parameters import parameter_groups
from megaft.run.optim import build_optimizer

WIDTH = 768
IDENTITY = Identity(8, 0, "", 0, "stream", True, "", "", None, {"weight_decay": 0.1}, None, None)


def main(output: Path, folder: Path, stage: int, millions: float, repeats: int) -> None:
    """Save in every way, once to warm up and then `repeats` times, and let the main rank write the figures."""
    parallel.join(parallel.discover(os.environ))
    engine = make_engine(stage, millions)
    ways = make_ways(engine, folder)
    runs = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            figures = timed(way, folder)
            if repeat:
                runs[name].append(figures)
    parameters = sum(getattr(one, "ds_numel", one.numel()) for one in engine.module.parameters())
    if parallel.is_main():
        output.write_text(json.dumps({"parameters": parameters, "state_bytes": 12 * parameters, "runs": runs}))
    parallel.leave()


def make_engine(stage: int, millions: float) -> Any:
    """Return an fp32 engine with matrices of GPT-2's shapes, after one AdamW step."""
    import deepspeed

    num_blocks = max(1, round(millions * 1e6 / (8 * WIDTH**2 + 5 * WIDTH)))
    sizes = [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)] * num_blocks
    model = torch.nn.Sequential(*(torch.nn.Linear(*size) for size in sizes))
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), 0.1), OptimConfig(), device_type="cpu")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    engine.backward(engine(torch.randn(1, WIDTH)).square().mean())
    engine.step()
    return engine


def make_ways(engine: Any, folder: Path) -> dict[str, Callable[[], float | None]]:
    """Return functions that save into `folder`, by name; each returns the wait of training, or None."""

    def megaft() -> None:
        Saver(folder, IDENTITY, CheckpointConfig()).save(engine, RunState(step=1))

    background = Saver(folder, IDENTITY, CheckpointConfig(in_background=True))  # keeps its host buffers, as in a run

    def megaft_async() -> float:
        background.save(engine, RunState(step=1))
        while parallel.max_over_ranks([int(not background.is_written)])[0]:
            time.sleep(0.005)
        background.publish()
        return background.blocking_seconds

    def deepspeed() -> None:
        engine.save_checkpoint(str(folder), tag="1")

    def deepspeed_made_sure() -> None:
        deepspeed()
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files[parallel.data_parallel_rank() :: parallel.data_parallel_size()]:
            fsync(path)
            sha256_of(path)

    return {
        "megaft": megaft,
        "megaft --checkpoint.async": megaft_async,
        "deepspeed": deepspeed,
        "deepspeed + fsync + SHA-256": deepspeed_made_sure,
    }


def timed(way: Callable[[], float | None], folder: Path) -> dict[str, float]:
    """Save into an empty folder on an idle disk; return the slowest rank's seconds and the bytes written."""
    if parallel.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.sync()
    parallel.barrier()
    began = time.perf_counter()
    blocking = way()
    seconds = time.perf_counter() - began
    slowest = parallel.max_over_ranks([round(1e6 * (blocking or seconds)), round(1e6 * seconds)])
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    parallel.barrier()  # the main rank empties the folder for the next
    return {"blocking_seconds": slowest[0] / 1e6, "seconds": slowest[1] / 1e6, "bytes": written}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
