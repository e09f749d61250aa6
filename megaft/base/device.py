"""Device and dtype of a rank's computation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megaft.base.dtypes import dtype_name
from megaft.base.errors import ConfigError
from megaft.base.plural import counted

if TYPE_CHECKING:
    from torch.distributed import Store

    from megaft.base.topology import Topology


def device_of(topology: Topology) -> torch.device:
    """Return this rank's device, and make it the current CUDA device if it is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = 0 if count == 1 else topology.local_rank  # some launchers show each rank only its own GPU
    if index >= count:
        raise ConfigError(
            f"rank {topology.rank} has local rank {index}, but sees {counted(count, 'GPU')}; start one rank per GPU, "
            "or let the launcher make one GPU visible to each rank, as srun --gpus-per-task=1 does."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the default random generators of the CPU and of this rank's GPU.

    The same as torch.manual_seed, which also formats a stack trace for every kind of device that is not initialized:
    0.5 ms.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


def copied_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the device, copied from pinned memory without waiting for a GPU."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def require_own_gpu(device: torch.device, world_size: int, store: Store) -> None:
    """Raise ConfigError on every rank if two ranks of `store` use the same GPU.

    NCCL does not support that. If only one rank raised, the others would report a lost peer and be requeued.
    """
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    if store.add(f"megaft/gpu/{gpu}", 1) > 1:
        store.set("megaft/gpu_of_two", gpu)
    if store.add("megaft/gpus", 1) == world_size:  # the last rank
        store.set("megaft/gpus_compared", str(int(store.check(["megaft/gpu_of_two"]))))
    if store.get("megaft/gpus_compared") == b"1":
        gpu = store.get("megaft/gpu_of_two").decode()
        raise ConfigError(f"two ranks use the GPU {gpu}; start one rank per GPU.")


def require_supported(dtype: str) -> None:
    """Raise ConfigError unless this machine's devices compute in `dtype`."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    supported = [dtype_name(kind) for kind in accelerator.supported_dtypes()]
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        supported.remove("bfloat16")  # DeepSpeed lists it, but V100 and T4 emulate it, many times slower
    if dtype not in supported:
        raise ConfigError(
            f"the DeepSpeed JSON asks for {dtype}, but {accelerator.device_name()} here supports "
            f"only {', '.join(supported)}. Use a JSON of ds_configs/ with one of these."
        )
