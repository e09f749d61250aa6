"""Build a planned run: process group, model, engine, validation and training state."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from megaft.base import parallel
from megaft.base.agreement import together
from megaft.base.device import require_supported
from megaft.base.progress import say
from megaft.base.topology import Topology
from megaft.checkpoint import engine_state
from megaft.checkpoint.run_state import Identity, RunState
from megaft.checkpoint.saver import Saver
from megaft.config.train import TrainConfig
from megaft.data.batches import BatchSplit
from megaft.models.hugging_face import require_fits
from megaft.models.rope import length_limit
from megaft.run.engine import build_engine
from megaft.run.events import Events, record_end
from megaft.run.guard import Guard
from megaft.run.identity import contents, identity_of, loaded_model, model_name
from megaft.run.model import build_model
from megaft.run.plan import Plan
from megaft.run.same_settings import require_same, settings_of
from megaft.run.throughput import Meter
from megaft.run.validation import Validation


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Planned run with everything built for it."""

    plan: Plan
    engine: Any
    device: torch.device
    batch_split: BatchSplit
    row_length: int | None
    """Length of every row of a batch; None where rows are padded to the longest of their micro-batch."""
    validation: Validation | None
    meter: Meter
    identity: Identity
    saver: Saver
    guard: Guard
    events: Events

    @property
    def config(self) -> TrainConfig:
        """The run's settings, as given."""
        return self.plan.config

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings, for RUN/config.json and the trackers."""
        return asdict(replace(self.config, optim=self.plan.setup.optim)) | {
            "deepspeed": self.plan.setup.engine_config,
            "max_steps": self.plan.max_steps,
            "peak_flops": self.meter.peak_flops,
            "peak_flops_source": self.meter.peak_source,
        }

    def end(self, state: RunState, exit_code: int, reason: str) -> int:
        """Record the reason for the end in the run's folder and return the exit code."""
        if parallel.is_main():
            record_end(self.config.run.dir, state.step, exit_code, reason)
            if exit_code:
                print(reason, flush=True)
        return exit_code


def build(plan: Plan, topology: Topology) -> Run:
    """Join the other ranks and build model, engine and validation, with the initial weights of a new run.

    Raises:
        UserError: On every rank, if any rank raises one.
    """
    config, setup, is_main = plan.config, plan.setup, topology.is_main
    device = parallel.join(topology, timedelta(minutes=config.run.timeout_minutes))
    require_same(settings_of(config, contents(plan)))
    # From here on ranks use collectives: an error on one rank is raised on all.
    together(require_supported, setup.dtype)
    say(f"{'loading' if config.model.path else 'making'} the model: {model_name(config)}", is_main)
    model, architecture = build_model(config, setup.engine_config)
    loaded = together(loaded_model, config, model.language_model, architecture)
    require_same(loaded.contents(config))
    rope_length_limit = length_limit(model.language_model.config)
    validation = together(_validation, plan, model.language_model, rope_length_limit)
    row_length = together(plan.samples.row_length, rope_length_limit)
    identity = identity_of(plan, loaded, validation)
    say(f"building the engine: ZeRO {setup.zero_stage}, {setup.dtype}, {setup.optim.name}", is_main)
    engine = build_engine(model, setup, device)
    meter = Meter.of(
        model.language_model.config,
        engine.module,
        config.data.context_length,
        getattr(torch, setup.dtype),
        device,
        config.metrics,
    )
    return Run(
        plan=plan,
        engine=engine,
        device=device,
        batch_split=BatchSplit(
            setup.micro_batch_size,
            setup.gradient_accumulation_steps,
            parallel.data_parallel_rank(),
            parallel.data_parallel_size(),
        ),
        row_length=row_length,
        validation=validation,
        meter=meter,
        identity=identity,
        saver=Saver(config.run.dir, identity, config.checkpoint),
        guard=Guard(config.guard, {}, smallest_loss_scale=engine_state.smallest_loss_scale(engine)),
        events=Events(config.run.dir, is_main),
    )


def _validation(plan: Plan, language_model: Any, rope_length_limit: int | None) -> Validation | None:
    """Return the validation, if any, after checking that the model fits the tokenizer and input length."""
    require_fits(language_model, plan.tokenizer, plan.config.longest_input)
    valid = plan.sources.valid
    return Validation(valid, plan.config, plan.tokenizer, rope_length_limit) if valid else None
