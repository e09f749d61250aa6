"""Ranks of one run as processes that can be killed one by one, and a launcher's patience with those left."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from faults_disk import Sabotage

WORLD_SIZE = 2
CONTEXT = get_context("forkserver")
PRELOADED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # drags in torch's compiler, a second and a half
    "megaft.assemble",
    "megaft.export",
    "megaft.recovery",
    "megaft.train",
    "transformers.models.gpt2.modeling_gpt2",
)
CONTEXT.set_forkserver_preload([*PRELOADED])
LIMIT = 240.0
"""Seconds after which a job hangs."""


class Job:
    """A training command on two ranks, as a launcher starts it."""

    def __init__(
        self, command: list[str], logs: Path, sabotage: Mapping[int, Sabotage] | None = None, *, is_forked: bool = True
    ) -> None:
        """Start the ranks.

        Args:
            command: Flags of megaft/train.py.
            logs: What the ranks say goes to this name with `-RANK.txt`.
            sabotage: What ranks do to themselves.
            is_forked: Take the libraries from the fork server; else start Python anew, which takes seconds.
        """
        from megaft.parallel import free_port

        self.logs = [logs.with_name(f"{logs.name}-{rank}.txt") for rank in range(WORLD_SIZE)]
        port, deeds = free_port(), sabotage or {}
        self.ranks = [
            CONTEXT.Process(
                target=run_rank, args=(rank, port, command, self.logs[rank], deeds.get(rank), is_forked), daemon=True
            )
            for rank in range(WORLD_SIZE)
        ]
        for rank in self.ranks:
            rank.start()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(WORLD_SIZE):
            pid = self.ranks[rank].pid
            if self.ranks[rank].is_alive() and pid:
                os.kill(pid, number)

    def first_end(self, seconds: float = LIMIT) -> bool:
        """Wait until a rank has ended; False when none has after so long."""
        return bool(wait([rank.sentinel for rank in self.ranks], seconds))

    def codes(self, patience: float, limit: float = LIMIT) -> list[int | None]:
        """Wait for all; return each rank's exit code, negative for a signal.

        As launchers do, ranks that are left `patience` seconds after the first bad end are killed. They have None, and
        so have all that are left when the job takes longer than `limit`.
        """
        ends, left = time.monotonic() + limit, [*self.ranks]
        while left and (seconds := ends - time.monotonic()) > 0:
            wait([rank.sentinel for rank in left], seconds)
            for rank in [rank for rank in left if not rank.is_alive()]:
                left.remove(rank)
                if rank.exitcode:
                    ends = min(ends, time.monotonic() + patience)
        self.send(signal.SIGKILL)
        for rank in self.ranks:
            rank.join()
        return [None if rank in left else rank.exitcode for rank in self.ranks]

    def said(self) -> str:
        """Return what the ranks wrote."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def run_rank(rank: int, port: int, command: list[str], log: Path, sabotage: Sabotage | None, is_forked: bool) -> None:
    """Be a rank: in the environment of a launcher, with its output in a file."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        MEGAFT_RENDEZVOUS_SECONDS="20",
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if not is_forked:
        program = str(Path(__file__).parents[2] / "megaft/train.py")
        os.execv(sys.executable, [sys.executable, program, *command])
    import torch

    from megaft import exit_code, train

    torch.set_num_threads(1)
    exit_code.SECONDS_FOR_MAIN = (
        1.0  # ranks that are not the main one let it speak first; no need to wait 20 s each time
    )
    if sabotage:
        sabotage.begin()
    sys.exit(train.main(command))
