"""Ranks, process groups and collectives. No other file queries ranks.

One program runs under every launcher: `topology.discover` reads this process's rank, `join` starts the process
group, and `start_tensor_parallelism` creates the tensor-parallel groups.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megaft.base import exit_code
from megaft.base.device import device_of, require_own_gpu
from megaft.base.ending import ending_of
from megaft.base.errors import CRASH, ConfigError, LostPeerError, UserError
from megaft.base.heartbeat import Heartbeat
from megaft.base.interruptible import call_in_thread
from megaft.base.model_parallel_unit import ModelParallelUnit
from megaft.base.network import connect_hosts, require_interfaces
from megaft.base.progress import say
from megaft.base.topology import Topology, discover, free_port, integer, is_main_of
from megaft.base.torch_flags import forbid_tf32

TIMEOUT = timedelta(minutes=10)
"""Default timeout of collectives."""
_timeout = TIMEOUT
_watches_peers = False
"""True in a process that a launcher started as a rank: it exits when a peer is lost."""
_heartbeat: Heartbeat | None = None


def join(topology: Topology, timeout: timedelta = TIMEOUT) -> torch.device:
    """Start the process group through DeepSpeed, with this timeout for collectives; return this rank's device."""
    import deepspeed

    end_tensor_parallelism()
    global _timeout
    _timeout = timeout
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls these at every step of stages 2 and 3.
    deprecated = "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    os.environ.update(
        RANK=str(topology.rank),
        LOCAL_RANK=str(topology.local_rank),
        WORLD_SIZE=str(topology.world_size),
        MASTER_ADDR=topology.master_addr,
        MASTER_PORT=str(topology.master_port),
    )
    # DeepSpeed would compile a shared-memory all-reduce for 90 s; only its inference engine calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = device_of(topology)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # NCCL aborts a process on timeout without a message, so the gloo group, which raises an error, times out first.
    longer = timeout + timedelta(minutes=1) if backend == "nccl" else timeout
    # DeepSpeed creates ZeRO's groups with torch's default timeout and has no option for it, so change the default.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = longer
    if not dist.is_initialized():
        _meet(topology, device, longer)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=longer, verbose=False)
    return device


def _meet(topology: Topology, device: torch.device, timeout: timedelta) -> None:
    """Start torch's process group, which DeepSpeed then uses; ConfigError if a rank does not join."""
    variable = "MEGAFT_RENDEZVOUS_SECONDS"  # how long to wait for ranks that start late
    seconds = integer(os.environ, variable) if variable in os.environ else int(TIMEOUT.total_seconds())
    where = f"{topology.master_addr}:{topology.master_port} (MASTER_ADDR and MASTER_PORT)"
    is_gpu = device.type == "cuda"
    backend = "nccl" if is_gpu else "gloo"
    require_interfaces(os.environ, backend)
    if topology.world_size > 1:
        say(f"waiting for {topology.world_size} ranks at {where}", topology.is_main)
    try:
        store, rank, world_size = call_in_thread(lambda: _rendezvous(topology.master_addr, seconds))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"{where} is in use by another program; set MASTER_PORT to another port, for example {free_port()}."
            ) from error
        joined = re.search(r"(\d+)/(\d+) clients joined", str(error))
        missing = f"{int(joined[2]) - int(joined[1])} of {joined[2]} ranks are" if joined else "rank 0 is"
        raise ConfigError(
            f"rank {topology.rank} waited {seconds} seconds at {where}, and {missing} missing. Check their error "
            f"messages, and that every node can reach this address; {variable} sets how long to wait."
        ) from error
    if _watches_peers and world_size > 1:
        global _heartbeat
        _heartbeat = Heartbeat(rank, world_size, topology.master_addr, store, _timeout.total_seconds())
    if is_gpu:
        require_own_gpu(device, world_size, store)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if is_gpu else None,  # so that NCCL connects here, where its error can be reported
    )


def _rendezvous(master_addr: str, seconds: int) -> tuple[dist.Store, int, int]:
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
    connect_hosts(rank, world_size, master_addr, store)
    return store, rank, world_size


def join_fake_group(world_size: int) -> Topology:
    """Start a fake process group with this process as rank 0; collectives return its own values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    return Topology("fake", 0, 0, world_size, "127.0.0.1", free_port())


def end_tensor_parallelism() -> None:
    """End tensor parallelism; see `start_tensor_parallelism`."""
    global _groups
    if _groups is not None:
        import deepspeed
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        deepspeed.utils.groups.mpu = None  # else DeepSpeed keeps it for later engines
        _groups = None


class Groups(NamedTuple):
    """Process groups of this rank under tensor parallelism."""

    tensor: Any
    data: Any


_groups: Groups | None = None
"""None without tensor parallelism."""


def start_tensor_parallelism(tensor_parallel_size: int) -> None:
    """Shard one model over each group of consecutive ranks, as megatron-core does.

    Call it once on every rank after `join`, before a model of megatron-core is built.
    """
    global _groups
    # megatron-core warns about its own deprecations, and about apex, which is optional.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    from megatron.core import parallel_state

    minutes = int(_timeout.total_seconds() // 60) + 1
    parallel_state.initialize_model_parallel(
        tensor_parallel_size, distributed_timeout_minutes=minutes, create_gloo_process_groups=False
    )
    _groups = Groups(parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group())


def mpu() -> ModelParallelUnit | None:
    """Return the tensor-parallel groups as DeepSpeed's `mpu`: ZeRO shards over the data ranks alone."""
    if _groups is None:
        return None
    return ModelParallelUnit(
        tensor_rank=tensor_parallel_rank(),
        tensor_size=tensor_parallel_size(),
        tensor_group=_groups.tensor,
        data_rank=data_parallel_rank(),
        data_size=data_parallel_size(),
        data_group=_groups.data,
    )


def leave() -> None:
    """End the process group, if there is one."""
    global _heartbeat
    _leave_group()
    if _heartbeat:
        _heartbeat.end()
        _heartbeat = None


def _leave_group() -> None:
    end_tensor_parallelism()
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_code_on_ranks(program: Callable[[Topology], int]) -> int:
    """Run a program as this process's rank, leave the process group, and return the exit code."""
    return exit_code.exit_code_of(lambda: _run_and_leave(program, discover(os.environ)), is_main=is_main_of(os.environ))


def _run_and_leave(program: Callable[[Topology], int], topology: Topology) -> int:
    global _watches_peers
    _watches_peers = True
    forbid_tf32()
    try:
        with naming_lost_peers(topology.rank):
            code = program(topology)
    except Exception as error:  # whatever it is, report it to the other ranks
        is_crash = not (topology.is_main or isinstance(error, UserError))
        if is_crash:
            traceback.print_exc()  # now: the main rank exits first, and the launcher then kills this one
        ending = ending_of(topology.rank, error)
        if _heartbeat and ending:
            _heartbeat.tell(ending)
        if ending:  # without one, leaving the group could wait for a lost rank
            _leave_group()
        if _heartbeat:
            _heartbeat.stand_down()
        if not is_crash:
            raise
        if _heartbeat and ending:
            _heartbeat.wait_for_main(exit_code.SECONDS_FOR_MAIN)
        return ending.exit_code if ending else CRASH
    finally:
        _watches_peers = False
    leave()
    return code


@contextmanager
def naming_lost_peers(rank: int) -> Iterator[None]:
    """Turn a collective's error about a lost rank into that rank's own error, or a LostPeerError."""
    try:
        yield
    except RuntimeError as error:
        # DistError: the rendezvous store is gone, because the main rank is.
        if not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in ("gloo/", "NCCL"))):
            raise
        ending = _heartbeat.first_ending() if _heartbeat else None
        if ending and not ending.is_resumable:
            raise ending.error_on(rank) from error
        detail = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        raise LostPeerError(
            f"rank {rank} lost its peers ({detail}): another rank ended or hangs; see its error. "
            "The same command resumes from the last checkpoint."
        ) from error


def have_met() -> bool:
    """Return True if this rank has met the others, and can report its failure to them."""
    return _heartbeat is not None or dist.is_initialized()


def tell_others(error: UserError) -> bool:
    """Report this rank's error to all ranks over the heartbeat; return False if there is none."""
    if _heartbeat is None:
        return False
    if ending := ending_of(rank(), error):
        _heartbeat.tell(ending)
    return True


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_initialized() else 0


def data_parallel_size() -> int:
    """Return the data-parallel size: the number of groups of ranks that train on different samples."""
    return world_size() // tensor_parallel_size()


def data_parallel_rank() -> int:
    """Return the data-parallel rank. Tensor-parallel groups consist of consecutive ranks, so they fit on a node."""
    return rank() // tensor_parallel_size()


def tensor_parallel_size() -> int:
    """Return the tensor-parallel size: the ranks that share each matrix and compute on the same samples."""
    return dist.get_world_size(_groups.tensor) if _groups else 1


def tensor_parallel_rank() -> int:
    """Return the tensor-parallel rank: the shard of each matrix that this rank has."""
    return rank() % tensor_parallel_size()


def is_main() -> bool:
    """Return True if this rank writes files and prints."""
    return rank() == 0


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Replace `tensor`, on every rank, by its sum over all ranks, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_over_data_ranks(tensor: Tensor) -> Tensor:
    """Replace `tensor`, equal on the ranks of a tensor-parallel group, by its sum over data ranks, and return it.

    It is bit-identical on all ranks, so that they take the same decisions from it.
    """
    if tensor_parallel_rank() > 0:
        tensor.zero_()
    return sum_over_ranks(tensor)


def sum_over_tensor_ranks(tensor: Tensor) -> Tensor:
    """Replace `tensor`, on every rank, by its sum over the tensor-parallel group, and return it."""
    if tensor_parallel_size() > 1:
        assert _groups
        dist.all_reduce(tensor, group=_groups.tensor)
    return tensor


def gather_over_tensor_ranks(tensor: Tensor) -> Tensor:
    """Return the tensors, all of one shape, of the tensor-parallel group, stacked in rank order."""
    if tensor_parallel_size() == 1:
        return tensor.unsqueeze(0)
    assert _groups
    gathered = tensor.new_empty(tensor_parallel_size(), *tensor.shape)
    dist.all_gather(list(gathered), tensor.contiguous(), group=_groups.tensor)
    return gathered


def barrier() -> None:
    """Wait until every rank calls this."""
    if world_size() > 1:
        dist.barrier()


def max_over_ranks(values: list[int]) -> list[int]:
    """Return the elementwise maximum over all ranks. It runs on the host and waits for no GPU."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(values)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return tensor.tolist()


def gather_numbers(numbers: list[int]) -> list[list[int]]:
    """Gather equally long lists of non-negative integers from all ranks, in rank order. It runs on the host."""
    before, after = rank(), world_size() - 1 - rank()
    zeros, count = [0] * len(numbers), len(numbers)
    flat = max_over_ranks([*before * zeros, *numbers, *after * zeros])
    return [flat[begin : begin + count] for begin in range(0, len(flat), count)]


@cache
def _host_group(world: object) -> Any:
    """Return the gloo group of all ranks in addition to NCCL's (None without NCCL), created once per process group."""
    return dist.new_group(backend="gloo", timeout=_timeout) if dist.get_backend() == "nccl" else None


def broadcast_from_main(tensor: Tensor) -> Tensor:
    """Broadcast the main rank's tensor: return it on every rank, on the device of that rank's `tensor`."""
    device = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    contribution = (tensor if is_main() else torch.zeros_like(tensor)).to(device)
    return sum_over_ranks(contribution).to(tensor.device)
