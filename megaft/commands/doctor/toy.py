"""Toy training run in memory: in plain torch on each rank alone, or through DeepSpeed on all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F

from megaft.base import parallel
from megaft.base.parallel import Topology
from megaft.checkpoint import engine_state
from megaft.config.deepspeed_json import resolve
from megaft.config.train import OptimConfig
from megaft.data.batches import BatchSplit, collate
from megaft.data.samples import IGNORE_INDEX, Sample
from megaft.models.hugging_face import NatsModel
from megaft.models.parameters import parameter_groups
from megaft.run.optim import build_optimizer
from megaft.weights.loading.causal_lm import CausalLM

SAMPLES_PER_RANK = 4
VOCAB_SIZE, CONTEXT_LENGTH, CLIPPING = 64, 32, 1.0
OPTIM = OptimConfig(learning_rate=1e-3, weight_decay=0.1)


def language_model() -> CausalLM:
    """Return a random two-layer GPT-2 of width 32 without dropout, always with the same weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB_SIZE, "n_positions": CONTEXT_LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=0, eos_token_id=0))


def sample(position: int) -> Sample:
    """Return random tokens; only a random number of the first are scored, so micro-batches differ in labels."""
    random = np.random.default_rng(position)
    tokens = random.integers(VOCAB_SIZE, size=CONTEXT_LENGTH + 1)
    labels = tokens[1:].copy()
    labels[random.integers(1, CONTEXT_LENGTH) :] = IGNORE_INDEX
    return Sample(tokens[:-1], labels, np.zeros_like(labels))


def train_alone(model: CausalLM, global_batch_size: int, device: torch.device) -> Iterator[float]:
    """Train in plain torch on the global batch at once; yield each step's loss in nats per token."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), OPTIM.weight_decay), OPTIM.learning_rate)
    step = 0
    while True:
        first = step * global_batch_size
        rows = [sample(first + row) for row in range(global_batch_size)]
        input_ids, labels, _ = collate(rows, first, CONTEXT_LENGTH, with_document_ids=False).to(device)
        logits = model(input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        yield loss.item()


def make_engine(topology: Topology, device: torch.device, stage: int, micro_batch_size: int) -> tuple[Any, BatchSplit]:
    """Return a DeepSpeed engine of the toy, and the split of its global batch."""
    # Threshold 0 makes stage 3 partition small parameters too.
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    json = {
        "train_batch_size": SAMPLES_PER_RANK * topology.world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_clipping": CLIPPING,
        "zero_optimization": zero,
    }
    setup = resolve(json, world_size=topology.world_size, optim=OPTIM, has_cuda=device.type == "cuda")
    model = NatsModel(language_model())
    groups = parameter_groups(model.named_parameters(), OPTIM.weight_decay)
    optimizer = build_optimizer(groups, OPTIM, device_type=device.type)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=setup.engine_config)[0]
    accumulation = setup.gradient_accumulation_steps
    return engine, BatchSplit(micro_batch_size, accumulation, topology.rank, topology.world_size)


def train(engine: Any, split: BatchSplit, steps: range, device: torch.device) -> list[float]:
    """Train through DeepSpeed, like the training program; return each step's loss in nats per token."""
    engine.train()
    losses = []
    for step in steps:
        batches = []
        for offset in split.first_positions(0):
            first = step * split.global_batch_size + offset
            rows = [sample(first + row) for row in range(split.micro_batch_size)]
            batches.append(collate(rows, first, CONTEXT_LENGTH, with_document_ids=False))
        num_scored = parallel.sum_over_data_ranks(torch.tensor(sum(b.num_scored for b in batches), device=device))
        nats = torch.zeros((), device=device)
        for batch in batches:
            batch_nats = engine(*batch.to(device))
            engine.backward(batch_nats * (parallel.data_parallel_size() / num_scored), scale_wrt_gas=False)
            engine_state.step(engine)
            nats += batch_nats.detach()
        losses.append(float(parallel.sum_over_data_ranks(nats) / num_scored))
    return losses
