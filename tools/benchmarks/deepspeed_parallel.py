"""Compare DeepSpeed's tensor parallelism (AutoTP) and sequence parallelism (Ulysses) with training on one rank.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tools/benchmarks/deepspeed_parallel.py autotp
    python -m torch.distributed.run --standalone --nproc-per-node 2 tools/benchmarks/deepspeed_parallel.py ulysses

A small Llama in fp32 trains for ten steps of SGD, sharded over all ranks, at ZeRO stages 0 to 3, without and with
clipping, and with two documents in a sample. The same model also trains on each rank alone, with torch. It prints the
largest relative difference of a loss and of a gradient norm; docs/parallelism.md has the results.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megaft.base import parallel

STEPS, ROWS, LENGTH, WORDS = 10, 4, 32, 128
RATE, CLIPPED_TO = 0.1, 0.5


def make_model() -> Any:
    """Return a Llama with grouped-query attention and the same weights on every rank."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": LENGTH, "vocab_size": WORDS}
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).float()  # its attention is sdpa


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return the inputs and labels of every step."""
    drawn = torch.randint(0, WORDS, (STEPS, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return [(one[:, :-1], one[:, 1:]) for one in drawn]


def nats(model: Any, inputs: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
    """Return the sum of nats over the labels."""
    logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def sgd(model: Any) -> torch.optim.Optimizer:
    """Return SGD for both: Adam would hide a gradient of twice the size, or its clipping."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)


def alone(clipping: float, positions: Tensor) -> tuple[list[float], list[float]]:
    """Train on this rank alone; return the losses and gradient norms before clipping."""
    model = make_model()
    optimizer, losses, norms = sgd(model), [], []
    for inputs, labels in batches():
        loss = nats(model, inputs, labels, positions) / labels.numel()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clipping or torch.inf)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


def together(scheme: str, stage: int, clipping: float, positions: Tensor) -> tuple[list[float], list[float | None]]:
    """Train a model sharded over the ranks, each on a whole sample or its part of the sequence; return the same."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": clipping}
    config |= {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    if scheme == "autotp":
        config["tensor_parallel"] = {"autotp_size": ranks, "preset_model": "llama"}
    model, mine = (
        make_model(),
        slice(None) if scheme == "autotp" else slice(rank * LENGTH // ranks, (rank + 1) * LENGTH // ranks),
    )
    mpu = ulysses() if scheme == "ulysses" else None
    engine: Any = deepspeed.initialize(model=model, optimizer=sgd(model), config=config, mpu=mpu)[0]
    losses, norms = [], []
    for inputs, labels in batches():
        loss = nats(engine, inputs[:, mine], labels[:, mine], positions[:, mine]) / labels[:, mine].numel()
        engine.backward(loss)  # DeepSpeed averages gradients over the parts of a sequence
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
        norms.append(engine.get_global_grad_norm())
    return losses, norms


@cache
def ulysses() -> Any:
    """Replace transformers' attention by Ulysses'; return the groups of ranks."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    return UlyssesSPAttentionHF.register_with_transformers(
        make_model(),
        core_attn_implementation="sdpa",
        sequence_parallel_size=dist.get_world_size(),
        micro_batch_size=ROWS,
        seq_length=LENGTH,
        seq_length_is_variable=False,
    )


def largest(ours: list[Any], theirs: list[float]) -> str:
    """Return the largest relative difference, if there are any figures."""
    if None in ours:
        return "not told"
    return f"{max(abs(float(our) - their) / their for our, their in zip(ours, theirs, strict=True)):.1e}"


def main(scheme: str) -> None:
    """Test every stage with and without clipping, and documents that share a sample."""
    parallel.join(parallel.discover(os.environ))
    one, two = (torch.arange(LENGTH // parts).repeat(parts).expand(ROWS, -1) for parts in (1, 2))
    cases = [(stage, clipping, one) for stage in range(4) for clipping in (0.0, CLIPPED_TO)] + [(1, 0.0, two)]
    expected = [alone(clipping, positions) for _, clipping, positions in cases]  # before attention is replaced
    for (stage, clipping, positions), (losses, norms) in zip(cases, expected, strict=True):
        found = together(scheme, stage, clipping, positions)
        what = f"{scheme}, ZeRO {stage}, clipping {clipping}, {1 if positions is one else 2} documents a sample"
        if parallel.is_main():
            print(f"{what}: loss {largest(found[0], losses)}, norm {largest(found[1], norms)}", flush=True)
    parallel.leave()


if __name__ == "__main__":
    main(sys.argv[1])
