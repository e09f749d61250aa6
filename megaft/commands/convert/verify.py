"""`megaft convert --verify`: compare two models' nats per token on CPU, one process a tensor-parallel shard.

`python -m megaft.commands.convert.verify`, under torchrun, is one of those processes. They compute in float32, on
weights rounded to the dtype of the conversion, so that two models differ by the order of sums alone.
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
from megaft.weights.classic_megatron import is_classic
from megaft.weights.loading.pretrained import load_language_model, set_dropout
from megaft.weights.manifest import is_checkpoint
from megaft.weights.megatron_folder import is_megatron_folder, read_manifest, shards_of
from megaft.weights.parameters import Weights, load_config
from megaft.weights.reading import open_weights
from megaft.weights.tensor_file import TensorFile

MAX_NATS, MAX_RELATIVE = 1e-3, 1e-5
"""Tolerance of one token's nats, and relative tolerance of the mean; a wrong weight differs a thousandfold."""
MAX_CONTEXT = 512
"""Input tokens per forward pass at most."""

PATIENT = "read_timeout=600,heartbeat_timeout=600,keep_alive_max_attempt=120"
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


class Difference(NamedTuple):
    """Difference of two models' nats on a text."""

    num_tokens: int
    mean: float
    """Nats per token of the first."""
    largest: float
    """Largest difference of one token's nats."""
    relative: float
    """Difference of the means, relative to the first."""


class Side(NamedTuple):
    """One of the two models that are compared."""

    source: str
    model_config: str | None = None
    """Configuration for a checkpoint that does not name its model."""

    @property
    def num_ranks(self) -> int:
        """Number of processes that run it."""
        folder = Path(self.source)
        return read_manifest(folder)["tensor_parallel_size"] if is_megatron_folder(folder) else 1


def verify(before: Side, after: Side, dtype: str, text: str) -> Difference:
    """Run both models on a text, one after the other, and return how they differ.

    Raises:
        DataError: One could not be run; it has said why.
        NumericsError: Nats of one are not finite, or they differ by more than the order of sums explains.
    """
    rows = rows_of(text, after.source)
    with TemporaryDirectory(prefix="megaft-verify-") as folder:
        Path(folder, "rows.json").write_text(json.dumps(rows))
        first, second = (_finite(_nats_of(side, dtype, Path(folder)), rows, side) for side in (before, after))
    mean = float(first.mean())
    largest, apart = float((first - second).abs().max()), abs(float(second.mean()) - mean)
    difference = Difference(len(first), mean, largest, apart / mean)
    if not (largest <= MAX_NATS and apart <= MAX_RELATIVE * mean):
        raise NumericsError(
            f"{after.source} is not {before.source}: a token's nats differ by {largest:.3g} (up to {MAX_NATS:g} is "
            f"rounding), their mean {mean:.6f} by {apart:.3g}. Do not use it, and report it; it was not removed."
        )
    return difference


def rows_of(text: str, source: str) -> list[list[int]]:
    """Return a text's tokens, cut to what the model reads at once; the last of a row is the first of the next.

    Where the folder has no tokenizer, its bytes are the tokens: models can be compared on any.
    """
    config = load_config(source)
    try:
        ids = load_tokenizer(source).encode(text)
    except DataError:
        ids = list(text.encode())
    ids = [token % config.vocab_size for token in ids]
    length = min(MAX_CONTEXT, config.max_position_embeddings)
    return [ids[begin : begin + length + 1] for begin in range(0, max(1, len(ids) - 1), length)]


def _nats_of(side: Side, dtype: str, folder: Path) -> Tensor:
    """Run a model on the rows in the folder; return every label's nats in float64."""
    num_ranks, cores = side.num_ranks, os.cpu_count() or 1
    launcher = ["torch.distributed.run", "--standalone", "--rdzv-conf", PATIENT, f"--nproc-per-node={num_ranks}"]
    program = ["megaft.commands.convert.verify", str(folder), dtype, *(part for part in side if part)]
    environment = {
        **os.environ,
        **{"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"},
        "OMP_NUM_THREADS": str(max(1, cores // num_ranks)),
    }
    command = [sys.executable, "-m", *launcher, "-m", *program]
    done = subprocess.run(command, env=environment, stdout=2)  # what they print is no result of ours
    if done.returncode:
        raise DataError(
            f"{side.source} could not be run on {counted(num_ranks, 'process', 'processes')}; their messages say why."
        )
    return torch.tensor(json.loads((folder / "nats.json").read_text()), dtype=torch.float64)


def _finite(nats: Tensor, rows: list[list[int]], side: Side) -> Tensor:
    """Return the nats of a model.

    Raises:
        NumericsError: Some are not finite.
    """
    offsets = np.cumsum([0, *(len(row) - 1 for row in rows)])
    require_finite_nats(
        nats.numpy(), offsets, name=f"{side.source} on the text of --verify", num_scored_tokens=len(nats)
    )
    return nats


def model_of(side: Side, dtype: torch.dtype) -> nn.Module:
    """Return a model, or this rank's part of it, whose weights are rounded to a dtype; it computes in float32."""
    folder = Path(side.source)
    if is_megatron_folder(folder):
        return _megatron(folder, dtype)
    if is_classic(folder) or is_checkpoint(folder):
        return NatsModel(_filled(open_weights(side.source, model_config=side.model_config), dtype))
    return NatsModel(load_language_model(side.source, dtype).float())


def _megatron(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Return this rank's part, from its own file alone."""
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


def _filled(weights: Weights, dtype: torch.dtype) -> nn.Module:
    """Return transformers' model of weights that it cannot load itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(weights.config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name).to(dtype))
    return model


@torch.no_grad()
def run(topology: parallel.Topology, folder: Path, dtype: str, side: Side) -> int:
    """Write the nats of every label of the rows in the folder; all ranks compute, the main one writes."""
    rows = json.loads((folder / "rows.json").read_text())
    model = model_of(side, getattr(torch, dtype)).eval()
    nats: list[float] = []
    for row in map(torch.tensor, rows):
        nats += model(row[None, :-1], row[None, 1:], per_token=True)[0].tolist()
    if topology.is_main:
        (folder / "nats.json").write_text(json.dumps(nats))
    return 0


def main(arguments: list[str]) -> int:
    """Run as a process of torchrun: FOLDER DTYPE SOURCE [MODEL_CONFIG]."""
    folder, dtype, *side = arguments
    program = partial(run, folder=Path(folder), dtype=dtype, side=Side(*side))
    return parallel.exit_code_on_ranks(program)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
