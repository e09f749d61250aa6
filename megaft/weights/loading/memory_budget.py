"""Memory budget of each rank: its share of the host's free memory."""

from __future__ import annotations

from zlib import crc32

from megaft.base import parallel
from megaft.base.host_memory import available_memory
from megaft.base.network import host_id
from megaft.weights.loading.size_limit import MemoryBudget


def agreed_memory_budget() -> MemoryBudget:
    """Return the budget of the host with the least free memory per rank, the same on all ranks. A collective."""
    host = [crc32(host_id().encode())]
    ranks = parallel.gather_numbers(host).count(host)
    share = -parallel.max_over_ranks([-(available_memory() // ranks)])[0]
    return MemoryBudget(share * ranks, ranks)
