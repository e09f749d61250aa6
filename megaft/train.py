"""The training program: `deepspeed megaft/train.py --deepspeed_config ds_configs/zero2_bf16.json ...`.

The same file runs under torchrun, mpirun and srun, and with plain python as a single rank. It reads top to bottom.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Started as a script, its own folder is first on sys.path, where our modules would hide libraries' names.
if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import replace

from megaft.config import TrainConfig, parse_train

if TYPE_CHECKING:
    from megaft.parallel import Topology


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, export; return the exit code."""
    config = parse_train(arguments)  # before the heavy imports, so that --help is instant
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars, of which every rank would draw its own
    from megaft import parallel

    return parallel.exit_code_on_ranks(lambda topology: train(config, topology))


def train(config: TrainConfig, topology: Topology) -> int:
    """Run from the newest checkpoint to the end, then export."""
    import torch

    from megaft import checkpoint, engine_state, parallel
    from megaft.assemble import assemble
    from megaft.dataset import micro_batches
    from megaft.export import export
    from megaft.guard import require_finite
    from megaft.metrics import Metrics
    from megaft.optim import learning_rate, set_learning_rate

    run = assemble(config, topology)
    engine, device, state, validation = run.engine, run.device, run.state, run.validation
    tokens_seen = torch.tensor(state.tokens_seen, device=device)
    padded_to = config.data.context_length if config.data.sample == "stream" else None

    with Metrics(
        config.run.dir,
        config.metrics,
        first_step=state.step,
        max_steps=run.max_steps,
        is_main=topology.is_main,
        meter=run.meter,
        settings=run.settings,
    ) as metrics:
        if validation and state.step == 0:
            with metrics.pause():
                metrics.validation(0, validation(engine, device).as_dict())

        engine.train()
        while not is_over(config, state, run.max_steps):
            step = state.step
            step_rate = learning_rate(step, run.setup.optim, run.max_steps)
            set_learning_rate(engine.optimizer, step_rate)
            batches = micro_batches(run.samples, step, run.cut, padded_to, config.data.attend_within_documents)
            counts = [sum(batch.num_scored for batch in batches), sum(batch.input_ids.numel() for batch in batches)]
            counts = torch.tensor(counts).to(device, non_blocking=True)
            num_scored, num_tokens = parallel.sum_over_data_ranks(counts).clamp(min=1)
            nats, grad_norm = torch.zeros((), dtype=torch.float64, device=device), None
            for batch in batches:
                # Dropout is a function of the seed and of which samples these are: the same after a resume and, at
                # one micro-batch size, on any number of ranks.
                torch.manual_seed(dropout_seed(config.run.seed, batch.first_position))
                batch_nats = engine(*batch.to(device))
                # DeepSpeed averages gradients over ranks; undo that, and divide by the tokens of the global batch.
                engine.backward(batch_nats * (parallel.data_parallel_size() / num_scored), scale_wrt_gas=False)
                grad_norm = engine_state.step(engine)  # weights move on the last micro batch only
                nats += batch_nats.detach()
            tokens_seen = tokens_seen + num_scored
            state = replace(state, step=step + 1, skipped_steps=engine.skipped_steps)
            rows = metrics.step(
                state.step,
                loss=parallel.sum_over_data_ranks(nats) / num_scored,
                grad_norm=grad_norm,
                learning_rate=step_rate,
                tokens_seen=tokens_seen,
                tokens=num_tokens,
                skipped_steps=state.skipped_steps,
            )
            require_finite(rows, config.run.dir)

            is_last = state.step == run.max_steps
            if validation and (is_last or is_due(state.step, config.run.validate_every)):
                with metrics.pause():
                    score = validation(engine, device)
                    metrics.validation(state.step, score.as_dict())
                    state = state.after_validation(score.nats_per_token)
            is_best = state.best_step == state.step
            if is_best or is_over(config, state, run.max_steps) or is_due(state.step, config.checkpoint.every):
                with metrics.pause():
                    state = replace(state, tokens_seen=int(tokens_seen))
                    checkpoint.save(engine, config.run.dir, state, run.identity, config.checkpoint.keep_last)

    parallel.barrier()
    if topology.is_main and config.run.export != "none":
        print(f"model: {export(config, state, run.tokenizer, run.setup.dtype)}", flush=True)
    return 0


def is_over(config: TrainConfig, state, max_steps: int) -> bool:
    """Whether the last step is done, or patience has run out."""
    return state.step >= max_steps or 0 < config.run.patience <= state.validations_since_best


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps comes after this one; 0 is never."""
    return every > 0 and step % every == 0


def dropout_seed(seed: int, position: int) -> int:
    """Return the seed of the dropout masks of the micro batch whose first sample is at `position`."""
    return (seed * 0x9E3779B97F4A7C15 + position) % 2**63


if __name__ == "__main__":
    sys.exit(main())
