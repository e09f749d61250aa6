"""Distributed test of ranks on a toy model: communication, ZeRO stages 0 to 3, and an elastic resume.

Losses are compared with those of plain torch, which trains the same toy on each rank alone, without DeepSpeed.
"""

from __future__ import annotations

import shutil
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaft.base import parallel
from megaft.base.agreement import together
from megaft.base.files import naming_disk_errors
from megaft.base.parallel import Topology
from megaft.base.plural import counted
from megaft.checkpoint import resume
from megaft.checkpoint.run_state import Identity, RunState
from megaft.checkpoint.saver import Saver
from megaft.commands.doctor import toy
from megaft.commands.doctor.table import Check, exit_code, show
from megaft.config.train import CheckpointConfig
from megaft.weights import manifest
from megaft.weights.checkpoint_reader import WEIGHT, CheckpointReader
from megaft.weights.loading.causal_lm import CausalLM

TOLERANCE = 1e-5
"""Tolerance in nats per token: fp32 sums in another order differ by about 1e-6."""
TIMEOUT = timedelta(seconds=60)
"""Timeout of collectives; ranks do little between them here."""
SECONDS_FOR_FILES = 30
"""Time for a network file system to show a new file on other hosts."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks under test, from this rank's point of view."""

    topology: Topology
    device: torch.device
    folder: Path

    def worst(self, name: str, difference: float, limit: float, unit: str) -> Check:
        """Compare the largest difference over all ranks with `limit`; a failure names its rank."""
        own = torch.tensor([difference], dtype=torch.float64, device=self.device)
        gathered = [torch.empty_like(own) for _ in range(self.topology.world_size)]
        dist.all_gather(gathered, own)
        values = torch.cat(gathered).nan_to_num(nan=torch.inf)
        largest, rank = values.max(0)
        if largest <= limit:
            return Check(name, "pass", f"correct to {largest:.0e} {unit}" if largest else "exact", is_numeric=True)
        found = f"off by {largest:.2g} {unit} on rank {int(rank)}; up to {limit:g} is rounding"
        return Check(name, "fail", found, "Check the device, link and driver there", is_numeric=True)


def run(folder: Path, as_json: bool, topology: Topology) -> int:
    """Join the ranks, run all tests, print the table on the main rank, and return the exit code on all."""
    began = time.perf_counter()
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_scatter_tensor` is deprecated", FutureWarning)
    device = parallel.join(topology, TIMEOUT)
    ranks = Ranks(topology, device, folder / f"megaft-doctor-{topology.master_port}")
    try:
        together(_make, ranks.folder)
        checks = [same_versions(ranks), *collectives(ranks), *same_losses(ranks)]
        if checks[0].status == "pass":  # a checkpoint needs the shared folder
            checks += same_after_resume(ranks)
        parallel.barrier()
    finally:
        shutil.rmtree(ranks.folder, ignore_errors=True)
    if topology.is_main:
        seconds = time.perf_counter() - began
        show(f"megaft doctor: {counted(topology.world_size, 'rank')}, {device.type}, {seconds:.0f} s", checks, as_json)
    parallel.barrier()  # the first rank to exit with an error makes the launcher kill the others
    return exit_code(checks)


def _make(folder: Path) -> None:
    with naming_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def same_versions(ranks: Ranks) -> Check:
    """Check that all ranks have the same libraries and share the folder."""
    rank, world_size = ranks.topology.rank, ranks.topology.world_size
    versions = " ".join(f"{package} {version(package)}" for package in ("torch", "deepspeed", "transformers"))
    (ranks.folder / f"rank-{rank}.txt").write_text(f"{versions}\n{socket.gethostname()}\n")
    parallel.barrier()
    deadline = time.perf_counter() + SECONDS_FOR_FILES
    while len(files := list(ranks.folder.glob("rank-*.txt"))) < world_size and time.perf_counter() < deadline:
        time.sleep(0.2)
    # Ranks exchange what they saw, so that all take the same branch.
    seen = [file.read_text().splitlines() for file in files]
    is_shared, hosts = len(files) == world_size, {lines[1] for lines in seen}
    others = {lines[0] for lines in seen} - {versions}
    has_failed = parallel.max_over_ranks([int(not is_shared), int(bool(others))])
    if has_failed[0]:
        return Check(
            "shared folder", "fail", f"{ranks.folder} is not shared by all ranks", "Set --folder to a shared folder"
        )
    if has_failed[1]:
        return Check(
            "versions", "fail", f"ranks differ: {versions}; {'; '.join(others)}", "Install the same versions everywhere"
        )
    return Check("ranks", "pass", f"{world_size} on {counted(len(hosts), 'host')}, {versions}; the folder is shared")


def collectives(ranks: Ranks) -> list[Check]:
    """Test each collective that ZeRO uses, and measure bandwidth and latency."""
    world_size, rank, device = ranks.topology.world_size, ranks.topology.rank, ranks.device
    ramp = torch.arange(1 << 20, dtype=torch.float32, device=device) % 1021

    def all_reduce() -> Tensor:
        values = ramp + rank
        dist.all_reduce(values)
        return values - (ramp * world_size + world_size * (world_size - 1) / 2)

    def all_gather() -> Tensor:
        out = torch.empty(world_size, 1 << 12, device=device)
        dist.all_gather(list(out), ramp[: 1 << 12] + rank)
        return out - (ramp[: 1 << 12] + torch.arange(world_size, device=device)[:, None])

    def reduce_scatter() -> Tensor:
        out = torch.empty(1 << 12, device=device)
        dist.reduce_scatter_tensor(out, (ramp[: 1 << 12] + rank).repeat(world_size))
        return out - (ramp[: 1 << 12] * world_size + world_size * (world_size - 1) / 2)

    def broadcast() -> Tensor:
        values = ramp + rank
        dist.broadcast(values, world_size - 1)
        return values - (ramp + world_size - 1)

    kinds = (all_reduce, all_gather, reduce_scatter, broadcast)
    checks = [ranks.worst(kind.__name__.replace("_", "-"), float(kind().abs().max()), 0.0, "") for kind in kinds]
    return [*checks, _bandwidth(ranks), _latency(ranks)]


def _bandwidth(ranks: Ranks) -> Check:
    """Measure the bus bandwidth of large all-reduces: 2 (n - 1) / n of the bytes leave each rank (as in nccl-tests)."""
    if ranks.topology.world_size == 1:
        return Check("bandwidth", "none", "one rank sends nothing")
    num_bytes = (256 if ranks.device.type == "cuda" else 16) << 20
    values = torch.zeros(num_bytes // 4, device=ranks.device)
    seconds = _seconds(lambda: dist.all_reduce(values), ranks.device, 5)
    world_size = ranks.topology.world_size
    speed = 2 * (world_size - 1) / world_size * num_bytes / seconds / 1e9
    return Check("bandwidth", "pass", f"{speed:.2f} GB/s in a {num_bytes >> 20} MiB all-reduce, {seconds * 1e3:.1f} ms")


def _latency(ranks: Ranks) -> Check:
    return Check("latency", "pass", f"{_seconds(dist.barrier, ranks.device, 20) * 1e3:.2f} ms for a barrier")


def _seconds(function: Callable[[], object], device: torch.device, times: int) -> float:
    """Return the mean seconds of a call, after one warm-up call."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    function()
    wait()
    began = time.perf_counter()
    for _ in range(times):
        function()
    wait()
    return (time.perf_counter() - began) / times


STEPS = 4
BATCH_SPLITS = ((0, 4), (0, 1), (1, 2), (2, 4), (2, 1), (3, 2), (3, 1))
"""ZeRO stage and micro-batch."""


def same_losses(ranks: Ranks) -> list[Check]:
    """Train the toy at each ZeRO stage and batch split, and compare every loss with plain torch's."""
    global_batch_size = toy.SAMPLES_PER_RANK * ranks.topology.world_size
    alone = toy.train_alone(toy.language_model(), global_batch_size, ranks.device)
    expected = [next(alone) for _ in range(STEPS)]
    return [_same_losses(ranks, stage, micro_batch_size, expected) for stage, micro_batch_size in BATCH_SPLITS]


def _same_losses(ranks: Ranks, stage: int, micro_batch_size: int, expected: list[float]) -> Check:
    engine, batch_split = toy.make_engine(ranks.topology, ranks.device, stage, micro_batch_size)
    losses = toy.train(engine, batch_split, range(STEPS), ranks.device)
    name = f"ZeRO {stage}, micro-batch {micro_batch_size} x {batch_split.gradient_accumulation_steps}"
    return ranks.worst(name, largest_difference(losses, expected), TOLERANCE, "nats per token")


def largest_difference(actual: list[float], expected: list[float]) -> float:
    """Return the largest absolute difference; NaN if any value is NaN."""
    return float((torch.tensor(actual) - torch.tensor(expected)).abs().max())


SAVED_AT = 2
RESUMED = ((3, 1), (1, 2), (0, 4))
_EMPTY: dict[str, Any] = {field.name: None for field in fields(Identity)}
IDENTITY = replace(Identity(**_EMPTY), optim=asdict(toy.OPTIM))
"""Identity of the toy run, for its checkpoint."""


def same_after_resume(ranks: Ranks) -> list[Check]:
    """Save at stage 2, resume at other stages, and compare with plain torch's uninterrupted run."""
    global_batch_size = toy.SAMPLES_PER_RANK * ranks.topology.world_size
    model = toy.language_model()
    alone = toy.train_alone(model, global_batch_size, ranks.device)
    for _ in range(SAVED_AT):
        next(alone)
    engine, batch_split = toy.make_engine(ranks.topology, ranks.device, 2, 1)
    toy.train(engine, batch_split, range(SAVED_AT), ranks.device)
    Saver(ranks.folder, IDENTITY, CheckpointConfig()).save(engine, RunState(step=SAVED_AT))
    saved = manifest.folder_of(ranks.folder, SAVED_AT)
    checks = [
        ranks.worst("saved at ZeRO 2, read on one rank", _weight_difference(saved, model), TOLERANCE, "per weight")
    ]
    expected = [next(alone) for _ in range(SAVED_AT, STEPS)]
    return checks + [_same_after_resume(ranks, saved, *split, expected) for split in RESUMED]


def _same_after_resume(ranks: Ranks, saved: Path, stage: int, micro_batch_size: int, expected: list[float]) -> Check:
    engine, batch_split = toy.make_engine(ranks.topology, ranks.device, stage, micro_batch_size)
    resume.load(engine, saved, IDENTITY)
    losses = toy.train(engine, batch_split, range(SAVED_AT, STEPS), ranks.device)
    name = f"resumed at ZeRO {stage}, micro-batch {micro_batch_size} x {batch_split.gradient_accumulation_steps}"
    return ranks.worst(name, largest_difference(losses, expected), TOLERANCE, "nats per token")


def _weight_difference(saved: Path, model: CausalLM) -> float:
    pieces = CheckpointReader(saved, manifest.verify(saved))
    weights = {f"language_model.{name}": weight.detach().cpu() for name, weight in model.named_parameters()}
    return max(float((pieces.whole(name, WEIGHT) - weights[name]).abs().max()) for name in pieces.shapes)
