"""Command lines of launchers for the running Python; its programs need not be on PATH."""

from __future__ import annotations

import sys

from megaft.base.parallel import free_port
from megaft.commands.convert.verify import RENDEZVOUS


def deepspeed(num_ranks: int) -> list[str]:
    """Return the `deepspeed` command for `num_ranks` ranks on this machine, up to the script's name."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--num_gpus", str(num_ranks)]
    return [*launcher, "--master_port", str(free_port())]


def torchrun(num_ranks: int) -> list[str]:
    """Return the `torchrun` command for `num_ranks` ranks on this machine, up to the script's name."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [*launcher, "--rdzv-conf", RENDEZVOUS]
