"""Ranks of one run as separate processes, started and cleaned up as by a launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

from faults_disk import Sabotage
from faults_hosts import Host

WORLD_SIZE = 2
CONTEXT = get_context("forkserver")
PRELOADED = (
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler, which takes 1.5 s
    "megaft.run.start",
    "megaft.checkpoint.export",
    "megaft.run.recovery",
    "megaft.train",
    "transformers.models.gpt2.modeling_gpt2",
    "tools.benchmarks.preload",  # from the folder of the repository
)
CONTEXT.set_forkserver_preload([*PRELOADED])
LIMIT = 240.0
"""Seconds after which a job counts as hung."""
BLOCK = signal.SIGUSR2
"""Signal that blocks a rank's main thread in a call that never returns, like a GPU that waits for a peer."""
ONE_AT_A_TIME = threading.Lock()
"""Lock for polling processes: multiprocessing polls all of them, and each exit status can be read once."""


class Job:
    """A training command on two ranks, as a launcher starts it."""

    def __init__(
        self,
        command: list[str],
        logs: Path,
        sabotage: Mapping[int, Sabotage] | None = None,
        hosts: Sequence[Host] = (),
        *,
        is_forked: bool = True,
    ) -> None:
        """Start the ranks.

        Args:
            command: Flags of megaft/train.py.
            logs: Output files are this name with `-RANK.txt`.
            sabotage: Faults that ranks inject into themselves.
            hosts: Host of each rank; empty for this machine.
            is_forked: Fork from a server with the libraries imported; otherwise start Python, which takes seconds.
        """
        from megaft.base.parallel import free_port

        self.logs = [logs.with_name(f"{logs.name}-{rank}.txt") for rank in range(WORLD_SIZE)]
        port, deeds = free_port(), sabotage or {}
        arguments = [(rank, port, command, self.logs[rank], deeds.get(rank), hosts) for rank in range(WORLD_SIZE)]
        self.ranks = [CONTEXT.Process(target=run_rank, args=(*given, is_forked), daemon=True) for given in arguments]
        for rank in self.ranks:
            with ONE_AT_A_TIME:
                rank.start()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks, or to all."""
        for rank in ranks or range(WORLD_SIZE):
            with ONE_AT_A_TIME:
                pid = self.ranks[rank].pid if self.ranks[rank].is_alive() else None
            if pid:
                os.kill(pid, number)

    def first_end(self, seconds: float = LIMIT) -> bool:
        """Wait until a rank has ended; return False after the timeout."""
        return bool(wait([rank.sentinel for rank in self.ranks], seconds))

    def codes(self, patience: float, limit: float = LIMIT) -> list[int | None]:
        """Wait for all; return each rank's exit code, negative for a signal.

        Like a launcher, kill the remaining ranks `patience` seconds after the first failure. Their code is None, as is
        that of all remaining ranks if the job takes longer than `limit`.
        """
        ends, left = time.monotonic() + limit, [*self.ranks]
        while left and (seconds := ends - time.monotonic()) > 0:
            wait([rank.sentinel for rank in left], seconds)
            with ONE_AT_A_TIME:
                ended = [rank for rank in left if not rank.is_alive()]
                left = [rank for rank in left if rank not in ended]
                if any(rank.exitcode for rank in ended):
                    ends = min(ends, time.monotonic() + patience)
        self.send(signal.SIGKILL)
        for rank in self.ranks:
            wait([rank.sentinel])
        with ONE_AT_A_TIME:
            return [None if rank in left else rank.exitcode for rank in self.ranks]

    def said(self) -> str:
        """Return the output of the ranks."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def run_rank(
    rank: int,
    port: int,
    command: list[str],
    log: Path,
    sabotage: Sabotage | None,
    hosts: Sequence[Host],
    is_forked: bool,
) -> None:
    """Run a rank on its host, in a launcher's environment, with its output in a file."""
    if hosts:
        hosts[rank].enter()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD_SIZE),
        MASTER_ADDR=hosts[0].address if hosts else "127.0.0.1",
        MASTER_PORT=str(port),
        MEGAFT_RENDEZVOUS_SECONDS="120",
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if not is_forked:
        program = str(Path(__file__).parents[2] / "megaft/train.py")
        os.execv(sys.executable, [sys.executable, program, *command])
    import torch

    from megaft import train
    from megaft.base import exit_code, heartbeat

    torch.set_num_threads(1)
    # Ranks wait for the main rank's message and for their main thread to end; here 20 s each time is too long.
    exit_code.SECONDS_FOR_MAIN = heartbeat.GRACE_SECONDS = 1.0
    signal.signal(BLOCK, lambda *_: ctypes.CDLL(None).sleep(int(2 * LIMIT)))
    if sabotage:
        sabotage.begin()
    sys.exit(train.main(command))
