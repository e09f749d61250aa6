"""Program of a rank of large_models.py: score with a partitioned model, or build the engine of one of many ranks.

python large_models_ranks.py forward|fake|cut FOLDER FIGURES.json
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaft.base import parallel
from megaft.checkpoint import engine_state
from megaft.config.deepspeed_json import read_deepspeed_json, resolve
from megaft.config.parallelism import num_data_ranks
from megaft.config.train import LoraConfig, ModelConfig, OptimConfig
from megaft.models import hugging_face
from megaft.models.parameters import parameter_groups
from megaft.run.optim import build_optimizer
from megaft.scoring.batch import ScoringBatch
from megaft.scoring.model import load_scoring_model

ROWS, LENGTH = 2, 128
WORLD_SIZE = 64
RECIPES = Path(__file__).parents[2] / "ds_configs"


def tokens(vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, the same on every rank."""
    drawn = torch.randint(0, vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return drawn[:, :-1], drawn[:, 1:]


def forward(folder: Path) -> dict[str, Any]:
    """Load a model sharded and score tokens with it."""
    device = parallel.join(parallel.discover(os.environ))
    scorer = load_scoring_model(str(folder), dtype=torch.bfloat16, device=device, is_partitioned=True)
    model: Any = scorer.model
    input_ids, labels = tokens(scorer.vocab_size)
    nats = float(scorer(ScoringBatch.of(input_ids.numpy(), labels.numpy(), device)).sum()) / (ROWS * LENGTH)
    held = held_bytes(model.module)
    parallel.leave()
    return {"parameters": scorer.num_parameters, "weight_bytes_of_a_rank": held, "nats_per_token": nats}


def fake(folder: Path, tensor_parallel_size: int = 1) -> dict[str, Any]:
    """Build training's engine as rank 0 of a fake process group."""
    import deepspeed

    topology = parallel.join_fake_group(WORLD_SIZE)
    device = parallel.join(topology)
    recipe = RECIPES / f"megatron_8.3b_{'zero3' if tensor_parallel_size == 1 else f'tp{tensor_parallel_size}'}.json"
    ranks = num_data_ranks(WORLD_SIZE, tensor_parallel_size)
    setup = resolve(read_deepspeed_json(recipe), world_size=ranks, optim=OptimConfig(), has_cuda=False)
    config = ModelConfig(from_scratch=str(folder), activation_checkpointing=True)
    if tensor_parallel_size == 1:
        model = hugging_face.NatsModel(hugging_face.build(config, LoraConfig(), 0, setup.engine_config))
    else:
        from megaft.models import megatron

        parallel.start_tensor_parallelism(tensor_parallel_size)
        model = megatron.MegatronNats(megatron.build(config, 0, setup.engine_config))
    optimizer = build_optimizer(parameter_groups(model.named_parameters(), 0.0), setup.optim, device_type=device.type)
    engine: Any = deepspeed.initialize(
        model=model, optimizer=optimizer, config=setup.engine_config, mpu=parallel.mpu()
    )[0]
    masters = {id(place.owner): place.owner.nbytes for place in engine_state.partition_slices(engine)}
    parameters: Any = model.parameters()
    counted = {
        "world_size": WORLD_SIZE,
        "tensor_parallel_size": tensor_parallel_size,
        "parameters_of_a_cut": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
        "weight_bytes_of_a_rank": held_bytes(model),
        "master_bytes_of_a_rank": sum(masters.values()),
    }
    parallel.leave()
    return counted


def held_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a rank's weight partitions and of the weights currently gathered."""
    parameters: Any = model.parameters()
    return sum(one.nbytes + (one.ds_tensor.nbytes if hasattr(one, "ds_tensor") else 0) for one in parameters)


if __name__ == "__main__":
    output = {"forward": forward, "fake": fake, "cut": lambda folder: fake(folder, 8)}[sys.argv[1]](Path(sys.argv[2]))
    assert math.isfinite(output.get("nats_per_token", 0))
    if os.environ["RANK"] == "0":
        Path(sys.argv[3]).write_text(json.dumps(output))
