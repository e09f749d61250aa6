"""Recovery from a bad step: stop the run, skip the step, or rewind to a checkpoint and leave out its samples."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megaft.base import parallel
from megaft.base.errors import NumericsError
from megaft.base.plural import counted
from megaft.checkpoint import resume
from megaft.checkpoint.run_state import RunState
from megaft.config.policies import POLICIES
from megaft.data.left_out import full_ranges, leave_out
from megaft.run.build import Run
from megaft.run.guard import BadStep, Guard
from megaft.scoring.score import Score
from megaft.weights import manifest


def accepts_step(guard: Guard, step: int, nats: Tensor, num_scored: Tensor, grad_norm: float) -> bool:
    """Return True if the guard accepts a step whose gradient is complete.

    Args:
        guard: The run's guard.
        step: Number of the step.
        nats: This rank's sum over the micro-batches so far.
        num_scored: Scored tokens of the global batch.
        grad_norm: Gradient norm of the global batch, before clipping.
    """
    loss = float(parallel.sum_over_data_ranks(nats.clone()) / num_scored)
    return guard.accepts(step, loss, grad_norm)


def recover(run: Run, bad_step: BadStep, state: RunState) -> RunState:
    """Record a bad step and return the state to continue from: unchanged, or the last checkpoint's.

    Raises:
        NumericsError: The policy is to stop, or the run has rewound too often.
    """
    size = run.batch_split.global_batch_size
    begin = state.position - (state.step - bad_step.step + 1) * size
    samples = full_ranges(begin, begin + size, state.left_out)
    run.events.record(
        bad_step.event,
        bad_step.step,
        decision=bad_step.decision,
        loss=bad_step.loss,
        grad_norm=bad_step.grad_norm,
        samples=samples,
    )
    then = POLICIES[bad_step.decision].then
    if then == "go on":
        return state
    run.saver.publish()  # keep the checkpoint saved before it
    if then == "end" or run.guard.rewinds >= run.config.guard.max_rewinds:
        raise NumericsError(_stop_message(run, bad_step, samples))
    return _rewind(run, leave_out(state.left_out, samples))


def validate_or_stop(run: Run, step: int) -> Score:
    """Return the validation score after `step`; a non-finite score ends the run whatever --guard.non-finite is.

    The losses of all steps before were finite, so there is no bad step to skip.

    Raises:
        NumericsError: Nats of a validation token are not finite. These weights are not saved.
    """
    assert run.validation is not None
    try:
        return run.validation(run.engine, run.device)
    except NumericsError as error:
        run.events.record("non-finite validation", step, decision="stop", reason=str(error))
        run.saver.publish()  # keep the checkpoint saved before it
        raise NumericsError(f"validation after step {step} ({_last_before(run, step)}): {error}") from error


def _rewind(run: Run, left_out: tuple[tuple[int, int], ...]) -> RunState:
    config = run.config
    folder = resume.find(config.run.dir).folder
    assert folder, "one was written before the first step"
    state = resume.load(run.engine, folder, run.identity, config.checkpoint.allow_changed)
    state = replace(state, left_out=left_out)
    run.guard.restore(state.guard | {"rewinds": run.guard.rewinds + 1})
    run.events.record("rewind", state.step, left_out=left_out)
    return state


def _stop_message(run: Run, bad_step: BadStep, samples: tuple[tuple[int, int], ...]) -> str:
    advice = "Inspect those samples, or set --guard.non-finite or --guard.spike to skip or rewind."
    if run.guard.rewinds or run.guard.skips:
        rewinds, skips = counted(run.guard.rewinds, "time"), counted(run.guard.skips, "step")
        advice = f"Before this step, the run rewound {rewinds} and skipped {skips} in a row."
    return (
        f"{bad_step}, samples {', '.join(f'{begin}-{end - 1}' for begin, end in samples)}; "
        f"{_last_before(run, bad_step.step)}. "
        f"Lower --optim.learning-rate. {advice}"
    )


def _last_before(run: Run, step: int) -> str:
    steps = [saved for saved in manifest.saved_steps(run.config.run.dir) if saved < step]
    return f"the last checkpoint before it is step {max(steps)}" if steps else "there is no checkpoint before it"
