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
from megaft.data.left_out import leave_out, whole_ranges
from megaft.run.build import Run
from megaft.run.guard import Guard, Trouble
from megaft.scoring.score import Score
from megaft.weights import manifest


def is_wanted(guard: Guard, step: int, nats: Tensor, num_scored: Tensor, grad_norm: float) -> bool:
    """Return True if the guard lets the weights move by a step whose gradient is complete.

    Args:
        guard: The run's.
        step: Number of the step.
        nats: This rank's, summed over the micro-batches so far.
        num_scored: Scored tokens of the global batch.
        grad_norm: Of the global batch, before clipping.
    """
    loss = float(parallel.sum_over_data_ranks(nats.clone()) / num_scored)
    return guard.wants(step, loss, grad_norm)


def recovered(run: Run, trouble: Trouble, state: RunState) -> RunState:
    """Record a step gone wrong and return the state to go on from: the same, or the last checkpoint's.

    Raises:
        NumericsError: The run is to stop there, or has gone back too often.
    """
    size = run.cut.global_batch_size
    begin = state.position - (state.step - trouble.step + 1) * size
    samples = whole_ranges(begin, begin + size, state.left_out)
    run.events.record(
        trouble.event,
        trouble.step,
        decision=trouble.decision,
        loss=trouble.loss,
        grad_norm=trouble.grad_norm,
        samples=samples,
    )
    then = POLICIES[trouble.decision].then
    if then == "go on":
        return state
    run.saver.publish()  # what was saved before it holds
    if then == "end" or run.guard.rewinds >= run.config.guard.max_rewinds:
        raise NumericsError(_stopped(run, trouble, samples))
    return _gone_back(run, leave_out(state.left_out, samples))


def validated(run: Run, step: int) -> Score:
    """Return the validation after `step`; one that is not finite ends the run, whatever guard.non-finite says.

    The losses of the steps before it were finite, so there is no step to do without.

    Raises:
        NumericsError: Nats of a validation token are not finite. Nothing is saved of these weights.
    """
    assert run.validation is not None
    try:
        return run.validation(run.engine, run.device)
    except NumericsError as error:
        run.events.record("non-finite validation", step, decision="stop", reason=str(error))
        run.saver.publish()  # what was saved before it holds
        raise NumericsError(f"validation after step {step} ({_last_before(run, step)}): {error}") from error


def _gone_back(run: Run, left_out: tuple[tuple[int, int], ...]) -> RunState:
    config = run.config
    folder = resume.find(config.run.dir).folder
    assert folder, "one was written before the first step"
    state = resume.load(run.engine, folder, run.identity, config.checkpoint.allow_changed)
    state = replace(state, left_out=left_out)
    run.guard.restore(state.guard | {"rewinds": run.guard.rewinds + 1})
    run.events.record("rewind", state.step, left_out=left_out)
    return state


def _stopped(run: Run, trouble: Trouble, samples: tuple[tuple[int, int], ...]) -> str:
    advice = "look at those samples, or let --guard.non-finite or --guard.spike be skip or rewind."
    if run.guard.rewinds or run.guard.skips:
        rewinds, skips = counted(run.guard.rewinds, "time"), counted(run.guard.skips, "step")
        advice = f"the run went back {rewinds} and skipped {skips} in a row before."
    return (
        f"{trouble}, samples {', '.join(f'{begin}-{end - 1}' for begin, end in samples)}; "
        f"{_last_before(run, trouble.step)}. "
        f"Lower --optim.learning-rate; {advice}"
    )


def _last_before(run: Run, step: int) -> str:
    steps = [saved for saved in manifest.saved_steps(run.config.run.dir) if saved < step]
    return f"the last checkpoint before it is step {max(steps)}" if steps else "there is no checkpoint before it"
