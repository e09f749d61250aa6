"""Start a run: write its settings, print notes, and resume from the newest checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import torch

from megaft.base import parallel, torch_flags
from megaft.base.agreement import together
from megaft.base.environment import job, write_config
from megaft.base.half_precision import megatron_note, product_dtype
from megaft.base.plural import counted
from megaft.base.progress import say
from megaft.checkpoint import resume as checkpoints
from megaft.checkpoint.run_state import RunState
from megaft.run.build import Run
from megaft.run.plan import Plan
from megaft.run.sources import notes_on_lengths, notes_on_templates, notes_on_unscored
from megaft.weights import manifest


def resume(run: Run) -> RunState:
    """Write the run's settings and load its newest checkpoint; return the state to resume from.

    Raises:
        UserError: On every rank, if any rank raises one.
    """
    together(_start_folder, run)
    if parallel.is_main():
        for note in _notes(run.plan, run.device):
            print(note, flush=True)
    say(f"looking for checkpoints: {run.config.run.dir}", parallel.is_main())
    state = _newest_state(run)
    run.guard.restore(state.guard)
    if state.step < run.plan.max_steps:
        together(run.events.require_progress, state.step)
    run.events.record("start", state.step, **job(), world_size=parallel.world_size())
    return state


def _start_folder(run: Run) -> None:
    if not parallel.is_main():
        return
    folder, is_fresh = run.config.run.dir, run.config.run.fresh
    folder.mkdir(parents=True, exist_ok=True)
    if is_fresh:
        checkpoints.remove_all(folder)
        run.events.record("fresh", 0)
    write_config(folder, run.settings())


def _notes(plan: Plan, device: torch.device) -> Iterator[str]:
    """Yield a sentence for each setting or dataset whose effect may surprise a user."""
    yield from plan.setup.notes
    yield from notes_on_lengths(plan.sources, plan.samples)
    yield from notes_on_unscored(plan.sources, plan.samples)
    yield from notes_on_templates(plan.sources, plan.tokenizer)
    if device.type == "cuda" and not plan.config.run.deterministic:
        yield torch_flags.NONDETERMINISM_NOTE
    dtype = getattr(torch, plan.setup.dtype)
    if plan.config.model.backend == "megatron" and product_dtype(dtype, device) is not dtype:
        yield megatron_note(dtype, plan.setup.zero_stage)


def _newest_state(run: Run) -> RunState:
    folder, allowed = run.config.run.dir, run.config.checkpoint.allow_changed
    resume_point = checkpoints.find(folder)
    for name, reason in resume_point.damaged:
        run.events.record("skipped checkpoint", 0, name=name, reason=reason)
    together(run.events.require_checkpoints, folder / "checkpoints")
    if resume_point.folder is None:
        return RunState()
    state = checkpoints.load(run.engine, resume_point.folder, run.identity, allowed)
    if parallel.is_main():
        print(f"continues from {resume_point.folder.name}, after {counted(state.step, 'step')}", flush=True)
    then, now = manifest.read_manifest(resume_point.folder)["identity"], asdict(run.identity)
    for name in allowed:
        run.events.record("allowed change", state.step, name=name, then=then.get(name), now=now[name])
    return state
