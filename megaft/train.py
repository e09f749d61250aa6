"""The training program: `deepspeed megaft/train.py --deepspeed_config ds_configs/zero2_bf16.json ...`.

The same file runs under torchrun, mpirun and srun, and with plain python as a single rank. It reads top to bottom.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Started as a script, its own folder is first on sys.path, where our modules would hide libraries' names.
if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import asdict, replace
from typing import Any

from megaft.config import TrainConfig, parse_train, require
from megaft.exit_code import exit_code_of


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, export; return the exit code."""
    config = parse_train(arguments)  # before the heavy imports, so that --help is instant
    from megaft import parallel

    code = exit_code_of(
        lambda: train(config, parallel.discover(os.environ)), is_main=os.environ.get("RANK", "0") == "0"
    )
    parallel.leave()
    return code


def train(config: TrainConfig, topology) -> int:
    """Run training from its newest checkpoint to its end, then export."""
    import deepspeed
    import torch

    from megaft import checkpoint, engine_state, parallel
    from megaft.checkpoint import Identity, RunState
    from megaft.dataset import Cut, micro_batches
    from megaft.deepspeed_json import read_deepspeed_json, resolve
    from megaft.environment import write_config
    from megaft.export import export
    from megaft.guard import require_finite
    from megaft.metrics import Metrics
    from megaft.models import hugging_face
    from megaft.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
    from megaft.throughput import Meter
    from megaft.tokenizer import load_tokenizer
    from megaft.training_data import open_samples, prepare_sources, require_same_tokenizer
    from megaft.validation import Validation

    has_cuda = torch.cuda.is_available()
    raw = read_deepspeed_json(config.deepspeed_config)
    setup = resolve(raw, world_size=topology.world_size, optim=config.optim, has_cuda=has_cuda)
    tokenizer_source = config.tokenizer_source
    sources = prepare_sources(config.data, tokenizer_source, config.run.dir, topology)
    tokenizer = load_tokenizer(tokenizer_source)
    require_same_tokenizer(sources, tokenizer)
    samples = open_samples(sources.train, config.data, config.run.seed)
    max_steps = config.run.max_steps or samples.num_steps(config.run.epochs or 1, setup.global_batch_size)
    require(
        setup.total_num_steps in (None, max_steps),
        f"the DeepSpeed JSON's scheduler has total_num_steps {setup.total_num_steps}, the run {max_steps} steps;"
        " give one length.",
    )

    device = parallel.join(topology)
    parallel.require_supported(setup.dtype)
    language_model = hugging_face.build(config.model, config.lora, config.run.seed)
    hugging_face.require_fits(language_model, tokenizer, config.longest_input)
    if config.data.attend_within_documents:
        hugging_face.require_keeps_documents_apart(language_model)
    identity = Identity(
        global_batch_size=setup.global_batch_size,
        seed=config.run.seed,
        data=samples.sha256,
        tokenizer=tokenizer.sha256,
        model=hugging_face.architecture(language_model),
    )
    model = hugging_face.NatsModel(language_model, config.model.cross_entropy)
    groups = parameter_groups(model.named_parameters(), setup.optim.weight_decay)
    optimizer = build_optimizer(groups, setup.optim, device_type="cpu" if setup.offload_optimizer else device.type)
    engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=setup.engine_config)[0]

    if config.run.fresh and topology.is_main:
        checkpoint.remove_all(config.run.dir)
    newest = checkpoint.find(config.run.dir)
    state = checkpoint.load(engine, newest, identity) if newest else RunState()
    tokens_seen = torch.tensor(state.tokens_seen, device=device)

    cut = Cut(setup.micro_batch_size, setup.gradient_accumulation_steps, topology.rank, topology.world_size)
    padded_to = config.data.context_length if config.data.sample == "stream" else None
    validation = Validation(sources.valid, config, tokenizer) if sources.valid else None
    meter = Meter.of(
        language_model.config, model, config.data.context_length, getattr(torch, setup.dtype), device, config.metrics
    )
    settings = asdict(config) | {"deepspeed": setup.engine_config, "max_steps": max_steps}
    settings |= {"peak_flops": meter.peak_flops, "peak_flops_source": meter.peak_source}
    if topology.is_main:
        config.run.dir.mkdir(parents=True, exist_ok=True)
        write_config(config.run.dir, settings)

    def save() -> None:
        checkpoint.save(engine, config.run.dir, state, identity, config.run.keep_last)

    with Metrics(
        config.run.dir,
        config.metrics,
        first_step=state.step,
        max_steps=max_steps,
        is_main=topology.is_main,
        meter=meter,
        settings=settings,
    ) as metrics:
        if validation and state.step == 0:
            with metrics.pause():
                metrics.validation(0, validation(engine, device).as_dict())

        engine.train()
        for step in range(state.step, max_steps):
            step_rate = learning_rate(step, setup.optim, max_steps)
            set_learning_rate(engine.optimizer, step_rate)
            batches = micro_batches(samples, step, cut, padded_to, config.data.attend_within_documents)
            num_scored = torch.tensor(sum(batch.num_scored for batch in batches), device=device)
            num_scored = parallel.sum_over_data_ranks(num_scored).clamp(min=1)
            nats, grad_norm = torch.zeros((), dtype=torch.float64, device=device), None
            for batch in batches:
                # Dropout is a function of the seed and of which samples these are: the same after a resume and, at
                # one micro-batch size, on any number of ranks.
                torch.manual_seed(dropout_seed(config.run.seed, batch.first_position))
                batch_nats = engine(*batch.to(device))
                # DeepSpeed averages gradients over ranks; undo that, and divide by the tokens of the global batch.
                engine.backward(batch_nats * (topology.world_size / num_scored), scale_wrt_gas=False)
                grad_norm = engine_state.step(engine)  # weights move on the last micro batch only
                nats += batch_nats.detach()
            loss = parallel.sum_over_data_ranks(nats) / num_scored
            tokens_seen = tokens_seen + num_scored
            state = replace(state, step=step + 1, skipped_steps=engine.skipped_steps)
            rows = metrics.step(
                step + 1,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=step_rate,
                tokens_seen=tokens_seen,
                tokens=setup.global_batch_size * config.data.context_length,
            )
            require_finite(rows, config.run.dir)

            is_last = step + 1 == max_steps
            if validation and (is_last or is_due(step + 1, config.run.validate_every)):
                with metrics.pause():
                    score = validation(engine, device)
                    metrics.validation(step + 1, score.as_dict())
                    state = state.after_validation(score.nats_per_token)
            is_last = is_last or 0 < config.run.patience <= state.validations_since_best
            if is_last or state.best_step == step + 1 or is_due(step + 1, config.run.save_every):
                with metrics.pause():
                    state = replace(state, tokens_seen=int(tokens_seen))
                    save()
            if is_last:
                break

    parallel.barrier()
    if topology.is_main and config.run.export != "none":
        export(config, state, tokenizer, setup.dtype)
    return 0


def is_due(step: int, every: int) -> bool:
    """Whether something done every so many steps comes after this one; 0 is never."""
    return every > 0 and step % every == 0


def dropout_seed(seed: int, position: int) -> int:
    """Return the seed of the dropout masks of the micro batch whose first sample is at `position`."""
    return (seed * 0x9E3779B97F4A7C15 + position) % 2**63


if __name__ == "__main__":
    sys.exit(main())
