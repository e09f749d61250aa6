"""Peer of the training benchmark: a plain torch loop with fp32 weights, autocast for bf16, and DDP on several ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from train_case import BETAS, EPSILON, GRADIENT_CLIPPING, LEARNING_RATE, SEED, WEIGHT_DECAY, Case
from train_peers import Recorder, Windows, arguments, new_model

from megaft.base.parallel import Topology, discover
from megaft.models.parameters import parameter_groups


def join(case: Case, topology: Topology) -> torch.device:
    """Start the process group and return this rank's device."""
    device = torch.device("cuda", topology.local_rank) if case.device == "cuda" else torch.device("cpu")
    if case.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if case.device == "cuda" else "gloo")
    return device


def micro_batches(samples: Windows, case: Case, topology: Topology, device: torch.device) -> Iterator[dict]:
    """Yield this rank's micro-batches, epoch after epoch."""
    sampler = DistributedSampler(samples, topology.world_size, topology.rank, seed=SEED)
    loader = DataLoader(
        samples, case.micro_batch_size, sampler=sampler, drop_last=True, pin_memory=device.type != "cpu"
    )
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for batch in loader:
            yield {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        epoch += 1


def train(
    case: Case, folder: Path, run_dir: Path, topology: Topology, device: torch.device, *, is_compiled: bool
) -> None:
    """Train the case, and write one row per step."""
    language_model = new_model(folder).to(device)
    language_model.config.use_cache = False
    language_model.train()
    is_distributed = topology.world_size > 1
    model: Any = torch.compile(language_model) if is_compiled else language_model
    if is_distributed:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    groups = parameter_groups(language_model.named_parameters(), WEIGHT_DECAY)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)
    batches = micro_batches(Windows(folder, case.context_length), case, topology, device)
    torch.manual_seed(SEED + topology.rank)  # dropout differs between ranks
    recorder = Recorder(run_dir, device)
    for step in range(case.max_steps):
        for micro_batch in range(case.accumulation):
            is_last = micro_batch + 1 == case.accumulation
            with nullcontext() if is_last or not is_distributed else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bf16"):
                    loss = model(**next(batches)).loss / case.accumulation
                loss.backward()
            recorder.add(loss)
        torch.nn.utils.clip_grad_norm_(language_model.parameters(), GRADIENT_CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(step + 1)
    recorder.close()


def main() -> None:
    """Train the case on this rank.

    DDP must be deleted before its process group: as the group's last owner it waits, holding the GIL, for a gloo thread
    that may be waiting for the GIL.
    """
    case, folder, run_dir = arguments()
    topology = discover(os.environ)
    device = join(case, topology)
    train(case, folder, run_dir, topology, device, is_compiled="compiled" in sys.argv[3:])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
