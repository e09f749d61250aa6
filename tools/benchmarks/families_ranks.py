"""Nats of megatron-core's modules whose matrices are sharded over two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RANKS = 2
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]


def nats_on_ranks(folder: str, tokens: Any) -> list[Any]:
    """Return each rank's nats of every row's tokens after the first.

    Raises:
        RuntimeError: A rank failed; the message has the last line of its stderr.
    """
    import torch

    from megaft.base import parallel

    with tempfile.TemporaryDirectory() as shared:
        torch.save(tokens, f"{shared}/tokens.pt")
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(parallel.free_port()), "WORLD_SIZE": str(RANKS)}
        ranks = [
            _start(folder, shared, address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(RANKS)
        ]
        for rank in ranks:
            errors = rank.communicate()[1]
            if rank.returncode:
                raise RuntimeError(f"a rank ended with {rank.returncode}: {errors.strip().splitlines()[-1]}")
        return [torch.load(f"{shared}/{rank}.pt", weights_only=True) for rank in range(RANKS)]


def _start(folder: str, shared: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, folder, shared]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def _on_rank(folder: str, shared: str) -> None:
    import torch

    from megaft.base import parallel
    from megaft.config.train import ModelConfig
    from megaft.models import megatron

    parallel.join(parallel.discover(os.environ))
    parallel.start_tensor_parallelism(RANKS)
    model = megatron.build(ModelConfig(path=folder, backend="megatron", dropout=0.0), seed=0, engine_config=None)
    tokens = torch.load(f"{shared}/tokens.pt", weights_only=True)
    with torch.no_grad():
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        nats = megatron.MegatronNats(model).eval()(inputs, labels, positions=torch.arange(labels.numel()))
    torch.save(nats, f"{shared}/{os.environ['RANK']}.pt")
    parallel.leave()


if __name__ == "__main__":
    _on_rank(*sys.argv[1:])
