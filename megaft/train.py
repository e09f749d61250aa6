"""The training program: `deepspeed megaft/train.py --deepspeed_config ds_configs/zero2_bf16.json ...`.

The same file runs under torchrun, mpirun and srun, and with plain python as a single rank. Read it from top to bottom.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# When this file runs as a script, Python puts megaft/ first on sys.path, where our modules would shadow libraries.
if Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from dataclasses import replace
from functools import partial

from megaft.base.exit_code import exit_code_of, print_help
from megaft.base.library_environment import set_library_environment
from megaft.config.train import TrainConfig, parse_train
from megaft.run import stop

if TYPE_CHECKING:
    from megaft.base.parallel import Topology
    from megaft.checkpoint.run_state import RunState


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train and export; return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & {*arguments}:
        return exit_code_of(print_help, parse_train, arguments)  # before the slow imports
    stop.listen()  # before the slow imports, so that a signal during them gives the right exit code
    set_library_environment()
    from megaft.base.progress import say
    from megaft.base.topology import is_main_of

    say("importing torch and deepspeed", is_main_of(os.environ))
    from megaft.base import parallel

    return parallel.exit_code_on_ranks(lambda topology: run(parse_train(arguments, topology.is_main), topology))


def run(config: TrainConfig, topology: Topology) -> int:
    """Train while holding the lock of the run's folder, and record the reason why the run ended."""
    from megaft.base.lock import locked
    from megaft.base.parallel import naming_lost_peers
    from megaft.run.events import recording_errors

    is_main = topology.is_main
    with locked(config.run.dir, is_main), recording_errors(config.run.dir, is_main), naming_lost_peers(topology.rank):
        return train(config, topology)


def train(config: TrainConfig, topology: Topology) -> int:
    """Plan and build the run, resume from the newest checkpoint, train, then export."""
    import torch

    from megaft.base import parallel, torch_flags
    from megaft.checkpoint import engine_state

    # Before DeepSpeed initializes CUDA.
    torch_flags.set_before_cuda(config.run.deterministic, config.parallel.tensor_parallel_size)
    from megaft.base.device import seed_generators
    from megaft.checkpoint.export import export
    from megaft.data.prefetch import Prefetch
    from megaft.run.build import build
    from megaft.run.metrics import Metrics
    from megaft.run.optim import learning_rate, set_learning_rate
    from megaft.run.plan import plan_run
    from megaft.run.recovery import accepts_step, recover, validate_or_stop
    from megaft.run.start import resume
    from megaft.run.validation import held_out_rows

    plan = plan_run(config, topology, has_cuda=torch.cuda.is_available())
    run = build(plan, topology)
    state = resume(run)
    engine, device, validation = run.engine, run.device, run.validation
    guard, saver, events, samples, max_steps = run.guard, run.saver, run.events, plan.samples, plan.max_steps
    stops = stop.StopRequests(config.run.dir, config.run.max_minutes, topology.is_main)
    tokens_seen = torch.tensor(state.tokens_seen, device=device)
    request = None

    prefetch = Prefetch(samples, run.batch_split, run.row_length)
    metrics = Metrics(
        config.run.dir,
        config.metrics,
        first_step=state.step,
        max_steps=max_steps,
        is_main=topology.is_main,
        meter=run.meter,
        settings=run.settings(),
    )
    with prefetch, metrics:
        if validation and state.step == 0:
            with metrics.pause():
                metrics.validation(0, validate_or_stop(run, 0).as_dict())
        if state.step == 0 and config.guard.goes_back:
            with metrics.pause():
                saver.save(engine, state)  # for a rewind before the first checkpoint

        engine.train()
        # A request with an exit code ends the run; one without (the SAVE file) only saves a checkpoint.
        while not is_over(config, state, max_steps) and not (request and request.exit_code):
            step_rate = learning_rate(state.step, plan.setup.optim, max_steps)
            set_learning_rate(engine.optimizer, step_rate)
            batches = prefetch.take(state.position, state.left_out)
            counts = [sum(batch.num_scored for batch in batches), sum(batch.num_tokens for batch in batches)]
            counts = torch.tensor(counts).to(device, non_blocking=True)
            # Never 0: every sample contains a scored token.
            num_scored, num_tokens = parallel.sum_over_data_ranks(counts)
            nats, grad_norm = torch.zeros((), dtype=torch.float64, device=device), None
            loss_scale = engine_state.loss_scale_state(engine).get("cur_scale")
            accepts = partial(accepts_step, guard, state.step + 1, nats, num_scored)
            for batch in batches:
                # Dropout masks depend only on the seed and the samples' positions. So they are the same after a resume
                # and, at equal micro-batch size, on any number of ranks.
                seed_generators(dropout_seed(config.run.seed, batch.first_position), device)
                batch_nats = engine(*batch.to(device))
                nats += batch_nats.detach()
                # DeepSpeed averages gradients over data ranks: undo that, and average over the global batch's scored
                # tokens instead.
                engine.backward(batch_nats * (parallel.data_parallel_size() / num_scored), scale_wrt_gas=False)
                # The optimizer steps on the last micro-batch only.
                grad_norm = engine_state.step(engine, accepts if guard.needs_norm_before_update else None)
            tokens_seen = tokens_seen + num_scored
            state = replace(
                state,
                step=state.step + 1,
                position=state.position + run.batch_split.global_batch_size,
                skipped_steps=engine.skipped_steps,
            )
            rows = metrics.step(
                state.step,
                loss=parallel.sum_over_data_ranks(nats) / num_scored,
                grad_norm=grad_norm,
                learning_rate=step_rate,
                tokens_seen=tokens_seen,
                tokens=num_tokens,
                skipped_steps=state.skipped_steps,
                loss_scale=loss_scale,
            )

            # Agree over ranks on stop requests, and on whether any rank is still writing a checkpoint.
            *requested, still_writing = parallel.max_over_ranks([*stops.seen(), int(not saver.is_written)])
            request = stops.request(*requested)
            is_last = state.step == max_steps
            validates = validation is not None and (is_last or is_due(state.step, config.run.validate_every))
            saves = request or is_last or is_due(state.step, config.checkpoint.every)
            if validates or saves or guard.needs_norm_before_update:
                rows += metrics.drain()  # all steps are judged, in order, before the run validates or saves
            newest_step = state.step
            for bad_step in guard.judge(rows):
                state = recover(run, bad_step, state)
            if state.step < newest_step:  # rewound
                tokens_seen = torch.tensor(state.tokens_seen, device=device)
                metrics.rewind(state.step)
                continue
            if saver.is_pending and not still_writing:
                saver.publish()

            if validation and validates:
                with metrics.pause():
                    score = validate_or_stop(run, state.step)
                    metrics.validation(state.step, score.as_dict())
                    state = state.after_validation(score.nats_per_token)
            if saves or state.best_step == state.step or is_over(config, state, max_steps):
                with metrics.pause():
                    state = replace(state, tokens_seen=int(tokens_seen), guard=guard.state())
                    saver.save(engine, state)
                    events.record("checkpoint", state.step, blocking_seconds=round(saver.blocking_seconds, 3))
        saver.publish()

    parallel.barrier()
    if request and request.exit_code and not is_over(config, state, max_steps):
        return run.end(state, request.exit_code, f"{request.reason} after step {state.step}; saved")
    if topology.is_main and config.run.export != "none":
        rows = held_out_rows(validation, samples, config.longest_input)
        print(f"model: {export(config, state, plan.tokenizer, plan.setup.dtype, rows)}", flush=True)
    return run.end(state, 0, f"done, after step {state.step}")


def is_over(config: TrainConfig, state: RunState, max_steps: int) -> bool:
    """Return True if the last step is done or early stopping has triggered."""
    return state.step >= max_steps or 0 < config.run.patience <= state.validations_since_best


def is_due(step: int, every: int) -> bool:
    """Return True if an action every `every` steps is due after step `step`; never if `every` is 0."""
    return every > 0 and step % every == 0


def dropout_seed(seed: int, position: int) -> int:
    """Return the seed of the dropout masks of a micro-batch whose first sample has this position."""
    return (seed * 0x9E3779B97F4A7C15 + position) % 2**63


if __name__ == "__main__":
    sys.exit(main())
