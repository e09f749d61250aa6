"""Resident memory of real ranks that train a GPT-2 of 34 M parameters on CPUs."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import estimates_engine
import torch
from estimates_cases import RANKS, TINY, Case

from megaft.base import parallel
from megaft.weights.families import dimensions_of

STEPS = 2
WARM_UP = TINY | {"n_embd": 32, "n_layer": 1, "vocab_size": 256}
SECONDS = 600
M_MMAP_THRESHOLD = -3


def measure() -> list[dict[str, Any]]:
    """Return rank 0's memory between two steps for each case: tensors and resident."""
    torch.set_num_threads(1)
    return [{"name": case.name, **_run(case)} for case in RANKS]


def _run(case: Case) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")  # libraries are imported once
    port, ours, theirs = parallel.free_port(), *context.Pipe(duplex=False)
    ranks = range(case.recipe.world_size)
    processes = [context.Process(target=_rank, args=(rank, port, case, theirs)) for rank in ranks]
    for process in processes:
        process.start()
    assert ours.poll(SECONDS), f"{case.name}: rank 0 returned no result"
    found = ours.recv()
    for process in processes:
        process.join()
    return found


def _rank(rank: int, port: int, case: Case, answers: Any) -> None:
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)  # return freed memory to the system
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.recipe.world_size}
    os.environ.update(
        {name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    parallel.join(parallel.discover(os.environ))
    _train(replace(case.recipe, dims=dimensions_of(WARM_UP, 0.0)))  # loaded by a first step
    gc.collect()
    libc.malloc_trim(0)  # including memory inherited from the parent
    before = resident_bytes()
    engine = _train(case.recipe)
    found = asdict(estimates_engine.held(engine, 0, 0)) | {"resident": resident_bytes() - before}
    if rank == 0:
        answers.send(found)
    parallel.leave()


def _train(recipe: Any) -> Any:
    engine = estimates_engine.build(recipe)
    for _ in range(STEPS):
        estimates_engine.train_step(engine, recipe, 1)
    gc.collect()
    return engine


def resident_bytes() -> int:
    """Return the anonymous resident memory of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
