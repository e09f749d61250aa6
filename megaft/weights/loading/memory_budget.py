"""Share of a host's free memory that each of its ranks may take."""

from __future__ import annotations

from zlib import crc32

from megaft.base import parallel
from megaft.base.host_memory import available_memory
from megaft.base.network import host_id
from megaft.weights.loading.size_limit import MemoryBudget


def agreed_memory_budget() -> MemoryBudget:
    """Return the room of each rank on the host that has least, the same on all ranks; every rank calls this."""
    host = [crc32(host_id().encode())]
    ranks = parallel.gather_numbers(host).count(host)
    share = -parallel.max_over_ranks([-(available_memory() // ranks)])[0]
    return MemoryBudget(share * ranks, ranks)
