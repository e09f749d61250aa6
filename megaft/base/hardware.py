"""GPUs: peak FLOP/s, memory, and published model FLOPs utilizations."""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB, GIB = 2**20, 2**30

CHUNK_BYTES = {"cpu": 31 * MIB, "cuda": 1024 * MIB}
"""Maximum bytes of fp32 logits held at once, by device type. On CPUs they stay below 32 MiB: from there on malloc
returns the buffer to the system after each chunk; its page faults cost half as much time as the matrix product. On
CUDA each chunk reads and writes the fp32 gradient of the output layer's weight, so chunks are large."""
ENTRIES_MULTIPLE = 128
"""Tensor cores need aligned rows, so on CUDA a vocabulary is padded to a multiple of this (GPT-2's 50,257 is not)."""
CHUNK_ROWS_MULTIPLE = {"cpu": 1, "cuda": 256}
"""Rows of a chunk are a multiple of this: tensor cores compute tiles of up to 256 rows."""


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Return the number of tokens in a chunk of logits, which depends on the vocabulary and device type only."""
    multiple = CHUNK_ROWS_MULTIPLE[device_type]
    return max(multiple, CHUNK_BYTES[device_type] // (4 * vocab_size) // multiple * multiple)


def padded_entries(num_entries: int) -> int:
    """Return the number of vocabulary entries rounded up to a multiple of ENTRIES_MULTIPLE."""
    return -(-num_entries // ENTRIES_MULTIPLE) * ENTRIES_MULTIPLE


# Dense bf16/fp16 peaks of tensor cores that accumulate in fp32, from NVIDIA's documents; the first match holds. Where a
# document gives rates with sparsity, they are twice these.
PEAK_FLOPS = {
    r"B200": 2250e12,  # data sheet of DGX B200: 36 PFLOP/s from 8 GPUs with sparsity
    r"H(100|200) NVL": 835e12,  # data sheets: 1,671 with sparsity
    r"H100 PCIe": 756e12,  # data sheet: 1,513 with sparsity
    r"H100|H200|GH200": 989e12,  # data sheets: 1,979 with sparsity
    r"A100": 312e12,  # data sheet, SXM and PCIe
    r"A10": 125e12,  # data sheet
    r"L40S": 362e12,  # data sheet
    r"L4": 121e12,  # data sheet: 242 with sparsity
    r"RTX A6000": 154.8e12,  # Ampere GA102 white paper, table 3
    r"RTX 4090": 165.2e12,  # Ada white paper, appendix A
    r"V100-PCIE": 112e12,  # data sheet
    r"V100": 125e12,  # data sheet, SXM2; DGX-2 for SXM3
    r"T4": 65e12,  # data sheet
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """GPU model, as `--hardware` names it."""

    name: str
    """Name in the driver; a key of PEAK_FLOPS matches it."""
    memory_bytes: int
    """Memory as nvidia-smi shows it."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    memory_bytes_per_second: float
    """Memory bandwidth in NVIDIA's data sheet or white paper."""

    @property
    def has_bf16(self) -> bool:
        """True if its tensor cores compute in bf16: compute capability 8.0 (A100) and above."""
        return self.capability >= (8, 0)


GPUS = {  # bandwidths: the documents named at PEAK_FLOPS
    "h100": Gpu("H100 80GB HBM3", 81559 * MIB, (9, 0), 3.35e12),
    "h200": Gpu("H200", 143771 * MIB, (9, 0), 4.8e12),
    "b200": Gpu("B200", 183359 * MIB, (10, 0), 8.0e12),  # 64 TB/s from 8 GPUs
    "a100": Gpu("A100-SXM4-80GB", 81920 * MIB, (8, 0), 2.039e12),
    "a100-40gb": Gpu("A100-SXM4-40GB", 40960 * MIB, (8, 0), 1.555e12),
    "l40s": Gpu("L40S", 46068 * MIB, (8, 9), 864e9),
    "a6000": Gpu("RTX A6000", 49140 * MIB, (8, 6), 768e9),
    "rtx4090": Gpu("RTX 4090", 24564 * MIB, (8, 9), 1008e9),
    "v100-32gb": Gpu("V100-SXM3-32GB", 32768 * MIB, (7, 0), 900e9),
    "v100": Gpu("V100-SXM2-16GB", 16384 * MIB, (7, 0), 900e9),
    "t4": Gpu("T4", 15360 * MIB, (7, 5), 300e9),
}

RESERVED_BYTES = 2048 * MIB
"""Bytes of each GPU outside torch's allocator: CUDA context, cuBLAS workspaces, NCCL, fragments."""


@dataclass(frozen=True, slots=True)
class PublishedUtilization:
    """Published model FLOPs utilization (MFU)."""

    gpu: str
    lowest: float
    highest: float
    source: str


PUBLISHED = (
    PublishedUtilization("H100", 0.487, 0.505, "llm.c: GPT-2 1558M, 8 GPUs, ZeRO-1, nothing recomputed"),
    PublishedUtilization("H100", 0.41, 0.49, "Megatron-LM: 1.7B, 7.1B and 16B on 48, 96 and 192 GPUs"),
    PublishedUtilization("H100", 0.42, 0.46, "MPT-1b and MPT-7b in bf16, 8 GPUs"),
    PublishedUtilization("H100", 0.33, 0.39, "torchtitan: Llama3-8B by FSDP, 8 GPUs, without and with torch.compile"),
    PublishedUtilization("V100", 0.24, 0.31, "Shoeybi et al. 2019: 15.1 PFLOP/s on 512 GPUs; 39 TFLOP/s on one"),
)
"""Published utilizations by GPU; the H100's stand in for GPUs that are not listed."""


def data_sheet_flops(name: str) -> float | None:
    """Return the half-precision peak of the GPU called `name`; None if unknown, as for a slice of a GPU (MIG)."""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAK_FLOPS.items() if re.search(rf"\b({pattern})\b", name)), None)


def published_utilizations(name: str) -> list[PublishedUtilization]:
    """Return the published utilizations of the GPU called `name`."""
    return [entry for entry in PUBLISHED if entry.gpu in name] or [entry for entry in PUBLISHED if entry.gpu == "H100"]
