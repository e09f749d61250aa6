"""`megaft convert --verify`: compare two models' nats on CPU, with one process per tensor-parallel shard.

`python -m megaft.commands.convert.verify`, under torchrun, is one of those processes. They compute in float32 with
weights rounded to the dtype of the conversion, so the two models differ only by the order of sums.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from megaft.base import parallel
from megaft.base.errors import DataError, NumericsError
from megaft.base.plural import counted
from megaft.data.tokenizer import load_tokenizer
from megaft.models.finite import require_finite_nats
from megaft.models.hugging_face import NatsModel
from megaft.models.nats_difference import MAX_NATS, MAX_RELATIVE, NatsDifference, nats_difference
from megaft.weights.classic_megatron import is_classic
from megaft.weights.loading.pretrained import load_language_model, set_dropout
from megaft.weights.manifest import is_checkpoint
from megaft.weights.megatron_folder import is_megatron_folder, read_manifest, shards_of
from megaft.weights.parameters import Weights, load_config
from megaft.weights.reading import open_weights
from megaft.weights.tensor_file import TensorFile

MAX_CONTEXT = 512
"""Largest number of input tokens per forward pass."""

RENDEZVOUS = "read_timeout=600,heartbeat_timeout=600,keep_alive_max_attempt=120"
"""Rendezvous settings for torchrun, whose default heartbeat timeout of 15 s ends launches on a busy machine."""

TEXT = """The harbour master kept two notebooks. In the first she wrote what the rules asked for: the name of a ship,
its flag, its draught in metres, the hour at which the pilot went aboard and the hour at which he came back. The second
was her own. There she wrote that the captain of a grain carrier had asked for fresh basil, that the fog of 12 March
tasted of iron, and that a tug called Patience had been late three times in one week.

When the old office was pulled down in 1987, both were found behind a cupboard. A student from the technical college
copied the first into a table of 4,316 rows and drew a curve from it. "Look," he said, "the harbour fills up by half a
centimetre a year, and nobody noticed." The curve was printed in the newspaper, between an advertisement for bicycles
and the results of the second division (Rovers 2, United 0).

Nobody printed anything of the second notebook. But the woman who runs the ferry café has it now, and she reads from it
on winter evenings, when the boats do not go out. She reads slowly, and leaves out the names. People laugh at the basil;
they fall silent at the fog. A retired engineer once asked her why it was that the useful book had told him one thing,
which he could have measured himself, while the useless one had told him so many that he could not have measured at all.

She thought about it. Then she poured him another coffee, looked at the black water, where the lights of the refinery
stood like a second town turned upside down, and said: "Somebody has to write down what nobody asked for."
"""


class ComparedModel(NamedTuple):
    """One of the two models to compare."""

    source: str
    model_config: str | None = None
    """As --model-config: the architecture, for a checkpoint that does not name its model."""

    @property
    def num_ranks(self) -> int:
        """Number of processes that run the model."""
        folder = Path(self.source)
        return read_manifest(folder)["tensor_parallel_size"] if is_megatron_folder(folder) else 1


def verify(before: ComparedModel, after: ComparedModel, dtype: str, text: str) -> NatsDifference:
    """Run both models on a text, one after the other, and return the difference.

    Raises:
        DataError: A model could not be run; its processes have printed the reason.
        NumericsError: Some nats are not finite, or they differ by more than rounding.
    """
    rows = rows_of(text, after.source)
    with TemporaryDirectory(prefix="megaft-verify-") as folder:
        Path(folder, "rows.json").write_text(json.dumps(rows))
        first, second = (_finite(nats_of(model, dtype, Path(folder)), rows, model) for model in (before, after))
    difference = nats_difference(first, second)
    if not difference.is_rounding():
        raise NumericsError(
            f"{after.source} differs from {before.source}: the largest difference of one token is "
            f"{difference.largest:.3g} nats (tolerance {MAX_NATS:g}); the mean {difference.mean:.6f} differs by "
            f"{difference.of_means:.3g} (tolerance {MAX_RELATIVE * difference.mean:.3g}). Do not use {after.source}, "
            "which was not removed; report this as a bug of megaft convert."
        )
    return difference


def rows_of(text: str, source: str) -> list[list[int]]:
    """Return a text's tokens, split into rows of the model's context; the last of a row is the first of the next.

    If the folder has no tokenizer, the text's bytes are the tokens: any tokens can compare two models.
    """
    config = load_config(source)
    try:
        ids = load_tokenizer(source).encode(text)
    except DataError:
        ids = list(text.encode())
    ids = [token % config.vocab_size for token in ids]
    length = min(MAX_CONTEXT, config.max_position_embeddings)
    return [ids[begin : begin + length + 1] for begin in range(0, max(1, len(ids) - 1), length)]


def nats_of(model: ComparedModel, dtype: str, folder: Path) -> Tensor:
    """Run a model on the rows in the folder; return every label's nats in float64."""
    num_ranks, cores = model.num_ranks, os.cpu_count() or 1
    launcher = ["torch.distributed.run", "--standalone", "--rdzv-conf", RENDEZVOUS, f"--nproc-per-node={num_ranks}"]
    program = ["megaft.commands.convert.verify", str(folder), dtype, *(field for field in model if field)]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
    }
    command = [sys.executable, "-m", *launcher, "-m", *program]
    done = subprocess.run(command, env=environment, stdout=2)  # their output goes to stderr
    if done.returncode:
        raise DataError(
            f"{model.source} could not be run on {counted(num_ranks, 'process', 'processes')}; see the error above."
        )
    return torch.tensor(json.loads((folder / "nats.json").read_text()), dtype=torch.float64)


def _finite(nats: Tensor, rows: list[list[int]], model: ComparedModel) -> Tensor:
    """Return the nats of a model if they are finite.

    Raises:
        NumericsError: Some nats are not finite.
    """
    offsets = np.cumsum([0, *(len(row) - 1 for row in rows)])
    require_finite_nats(
        nats.numpy(), offsets, name=f"{model.source} on the text of --verify", num_scored_tokens=len(nats)
    )
    return nats


def load_model(compared: ComparedModel, dtype: torch.dtype) -> nn.Module:
    """Return a model, or this rank's shard of it, with weights rounded to a dtype; it computes in float32."""
    folder = Path(compared.source)
    if is_megatron_folder(folder):
        return _megatron(folder, dtype)
    if is_classic(folder) or is_checkpoint(folder):
        return NatsModel(_transformers_model(open_weights(compared.source, model_config=compared.model_config), dtype))
    return NatsModel(load_language_model(compared.source, dtype).float())


def _megatron(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return this rank's shard, read from its own file only."""
    parallel.join(parallel.discover(os.environ))
    parallel.start_tensor_parallelism(parallel.world_size())
    from megaft.models.megatron import MegatronModel, MegatronNats

    config = load_config(str(folder))
    set_dropout(config, 0.0)
    model = MegatronModel(config)
    file: TensorFile = shards_of(folder, config)[parallel.tensor_parallel_rank()]
    with torch.no_grad():
        for name, parameter in model.gpt.named_parameters():
            parameter.copy_(file.read(name).to(dtype))
    return MegatronNats(model)


def _transformers_model(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Return a transformers model with weights from a format that transformers cannot load."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(weights.config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name).to(dtype))
    return model


@torch.no_grad()
def run(topology: parallel.Topology, folder: Path, dtype: str, compared: ComparedModel) -> int:
    """Write the nats of every label of the rows in the folder; all ranks compute, the main rank writes."""
    rows = json.loads((folder / "rows.json").read_text())
    model = load_model(compared, getattr(torch, dtype)).eval()
    nats: list[float] = []
    for row in map(torch.tensor, rows):
        nats += model(row[None, :-1], row[None, 1:], positions=torch.arange(len(row) - 1)).tolist()
    if topology.is_main:
        (folder / "nats.json").write_text(json.dumps(nats))
    return 0


def main(arguments: list[str]) -> int:
    """Entry point under torchrun; arguments: FOLDER DTYPE SOURCE [MODEL_CONFIG]."""
    folder, dtype, *compared = arguments
    program = partial(run, folder=Path(folder), dtype=dtype, compared=ComparedModel(*compared))
    return parallel.exit_code_on_ranks(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
