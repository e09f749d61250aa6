"""Build a training run: settings, data, ranks, model, engine and checkpoint, the cheapest checks first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch

from megaft.base import cpu_speed, parallel, torch_flags
from megaft.base.checks import require
from megaft.base.device import require_supported
from megaft.base.environment import job, write_config
from megaft.base.parallel import Topology
from megaft.base.plural import counted
from megaft.base.redaction import without_secrets
from megaft.checkpoint import engine_state, resume
from megaft.checkpoint.run_state import Identity, RunState
from megaft.checkpoint.saver import Saver
from megaft.config.deepspeed_json import Resolved, read_deepspeed_json, resolve
from megaft.config.optimizers import OPTIMIZERS
from megaft.config.parallelism import num_data_ranks
from megaft.config.schedules import SCHEDULES
from megaft.config.train import TrainConfig
from megaft.data.batches import Cut
from megaft.data.receipt import load_receipt
from megaft.data.sequence import Samples
from megaft.data.tokenizer import AnyTokenizer, load_tokenizer
from megaft.models import hugging_face, trials
from megaft.models.parameters import parameter_groups
from megaft.models.rope import length_limit
from megaft.run.events import Events, record_end
from megaft.run.guard import Guard
from megaft.run.optim import build_optimizer
from megaft.run.same_settings import require_same, settings_of
from megaft.run.sources import (
    Sources,
    notes_on_lengths,
    notes_on_templates,
    notes_on_unscored,
    open_samples,
    prepare_sources,
    require_same_tokenizer,
)
from megaft.run.throughput import Meter
from megaft.run.trackers import check_trackers
from megaft.run.validation import Validation
from megaft.weights import manifest
from megaft.weights.loading import pretrained
from megaft.weights.megatron_folder import MANIFEST


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Objects that the training loop works with."""

    config: TrainConfig
    engine: Any
    device: torch.device
    setup: Resolved
    samples: Samples
    cut: Cut
    padded_to: int | None
    """Length of every row; None where rows are padded to the longest of their micro-batch."""
    validation: Validation | None
    tokenizer: AnyTokenizer
    meter: Meter
    identity: Identity
    saver: Saver
    guard: Guard
    events: Events
    state: RunState
    """State of the checkpoint that the run continues from, or of a new run."""
    max_steps: int
    settings: dict[str, Any]
    """Resolved settings, for RUN/config.json and the trackers."""

    def end(self, state: RunState, exit_code: int, reason: str) -> int:
        """Leave the reason in the run's folder and return the exit code."""
        if parallel.is_main():
            record_end(self.config.run.dir, state.step, exit_code, reason)
            if exit_code:
                print(reason, flush=True)
        return exit_code


def assemble(config: TrainConfig, topology: Topology) -> Parts:
    """Check settings, prepare data, then join the other ranks, build the engine and load the newest checkpoint."""
    check_trackers(config.metrics)
    raw = read_deepspeed_json(config.deepspeed_config)
    has_cuda = torch.cuda.is_available()
    setup = resolve(
        raw,
        world_size=num_data_ranks(topology.world_size, config.parallel.tensor_parallel_size),
        optim=config.optim,
        has_cuda=has_cuda,
        resumed_batch_size=resumed_batch_size(config),
    )
    _require_trainable(config, setup)
    sources = prepare_sources(config.data, config.tokenizer_source, config.run.dir, topology)
    tokenizer = load_tokenizer(config.tokenizer_source)
    require_same_tokenizer(sources, tokenizer)
    samples = open_samples(sources.train, config.data, config.run.seed)
    max_steps = _max_steps(config, setup, samples)

    device = parallel.join(topology, timedelta(minutes=config.run.timeout_minutes))
    require_same(settings_of(config, _contents(raw, sources, samples.sha256, tokenizer)))
    # From here on the others would wait for a rank that raises alone: what one finds, all raise.
    parallel.together(require_supported, setup.dtype)
    model, architecture = _model(config, setup)
    longest_alike = length_limit(model.language_model.config)
    validation = parallel.together(_validation, sources, config, tokenizer, model.language_model, longest_alike)
    padded_to = parallel.together(_padded_to, config, longest_alike)
    identity = Identity(
        global_batch_size=setup.global_batch_size,
        seed=config.run.seed,
        data=samples.sha256,
        context_length=config.data.context_length,
        sample=config.data.sample,
        attend_within_documents=config.data.attend_within_documents,
        tokenizer=tokenizer.sha256,
        model=architecture,
        dropout=config.model.dropout,
        optim=asdict(setup.optim),
        schedule_steps=max_steps if SCHEDULES[setup.optim.schedule].decays else None,
        validation=validation.name if validation else None,
        names=_names(config),
    )
    engine = _engine(model, setup, device)
    meter = Meter.of(
        model.language_model.config,
        engine.module,
        config.data.context_length,
        getattr(torch, setup.dtype),
        device,
        config.metrics,
    )
    settings = asdict(replace(config, optim=setup.optim)) | {
        "deepspeed": setup.engine_config,
        "max_steps": max_steps,
        "peak_flops": meter.peak_flops,
        "peak_flops_source": meter.peak_source,
    }
    events = Events(config.run.dir, topology.is_main)
    parallel.together(_start_folder, config, settings, events)
    if topology.is_main:
        lengths, unscored = notes_on_lengths(sources.train, config.data), notes_on_unscored(sources.train, samples)
        inexact = [torch_flags.NOT_EXACT] if has_cuda and not config.run.deterministic else []
        templates = notes_on_templates(sources, tokenizer)
        for note in (*setup.notes, *lengths, *unscored, *templates, *inexact, *_notes_on_cpu(setup, device)):
            print(note, flush=True)
    engine_state.keep_loss_scale_at_floor(engine)
    state = _state(config, engine, identity, events, max_steps)
    return Parts(
        config=config,
        engine=engine,
        device=device,
        setup=setup,
        samples=samples,
        cut=Cut(
            setup.micro_batch_size,
            setup.gradient_accumulation_steps,
            parallel.data_parallel_rank(),
            parallel.data_parallel_size(),
        ),
        padded_to=padded_to,
        validation=validation,
        tokenizer=tokenizer,
        meter=meter,
        identity=identity,
        saver=Saver(config.run.dir, identity, config.checkpoint),
        guard=Guard(config.guard, state.guard, smallest_loss_scale=engine_state.smallest_loss_scale(engine)),
        events=events,
        state=state,
        max_steps=max_steps,
        settings=settings,
    )


def _notes_on_cpu(setup: Resolved, device: torch.device) -> list[str]:
    if device.type != "cpu" or setup.dtype == "float32":
        return []
    dtype = getattr(torch, setup.dtype)
    seconds = cpu_speed.seconds_of_products((torch.float32, dtype))
    return cpu_speed.notes_on_precision(seconds, dtype, setup.zero_stage, setup.offload_optimizer)


def resumed_batch_size(config: TrainConfig) -> int | None:
    """Return the global batch size of the run that the folder holds; None where there is none to continue."""
    newest = None if config.run.fresh else manifest.peek(config.run.dir)
    return newest["identity"].get("global_batch_size") if newest else None


def _names(config: TrainConfig) -> dict[str, str]:
    """Return readable names of the hashed fields of the run's identity."""
    names = {
        "data": " ".join(config.data.train),
        "tokenizer": config.tokenizer_source,
        "model": str(config.model.path or config.model.from_scratch),
        "validation": str(config.data.valid),
    }
    return {part: without_secrets(name) for part, name in names.items()}


def _require_trainable(config: TrainConfig, setup: Resolved) -> None:
    """Refuse a model that does not exist or that its backend cannot read, and an optimizer for other modules."""
    is_megatron = config.model.backend == "megatron"
    if config.model.path is not None:
        pretrained.require_there(config.model.path)
        require(
            is_megatron or not (Path(config.model.path) / MANIFEST).is_file(),
            f"--model.path is {config.model.path}, which has megatron's format; give --model.backend megatron, or "
            "write it anew with megaft convert --format hugging-face.",
        )
    require(
        not (is_megatron and OPTIMIZERS[setup.optim.name].needs_whole_matrices),
        f"--optim.name is {setup.optim.name}, which looks at whole matrices, and those of --model.backend megatron are "
        "put together otherwise; give --optim.name adamw or --model.backend hugging-face.",
    )


def _max_steps(config: TrainConfig, setup: Resolved, samples: Samples) -> int:
    max_steps = config.run.max_steps or samples.num_steps(config.run.epochs or 1, setup.global_batch_size)
    require(
        setup.total_num_steps in (None, max_steps),
        f"the DeepSpeed JSON's scheduler has total_num_steps {setup.total_num_steps}, "
        f"the run {counted(max_steps, 'step')}; give one length.",
    )
    return max_steps


def _model(config: TrainConfig, setup: Resolved) -> tuple[Any, str]:
    """Return the module of nats that a run starts from, and what its checkpoints know the architecture by."""
    if config.model.backend == "megatron":
        parallel.cut_matrices(config.parallel.tensor_parallel_size)
        from megaft.models import megatron

        language_model = megatron.build(config.model, config.run.seed, setup.engine_config)
        return megatron.MegatronNats(language_model), megatron.architecture(language_model)
    language_model = hugging_face.build(config.model, config.lora, config.run.seed, setup.engine_config)
    model = parallel.together(nats_model, language_model, config)
    return model, hugging_face.architecture(language_model)


def nats_model(language_model: Any, config: TrainConfig) -> hugging_face.NatsModel:
    """Return the module of nats of a model that training can trust."""
    with trials.on_trial(language_model) as small:
        trials.require_language_model(language_model, small)
        if config.data.attend_within_documents:
            trials.require_keeps_documents_apart(language_model, small)
        return hugging_face.NatsModel(language_model, config.model.cross_entropy, small)


def _contents(raw: dict[str, Any], sources: Sources, samples: str, tokenizer: AnyTokenizer) -> dict[str, Any]:
    """Return what the files that the settings name hold."""
    valid = load_receipt(sources.valid.prefix)["bin_sha256"] if sources.valid else None
    return {
        "the content of --deepspeed_config": raw,
        "the SHA-256 of --data.train": samples,
        "the SHA-256 of --data.valid": valid,
        "the SHA-256 of the tokenizer": tokenizer.sha256,
    }


def _validation(
    sources: Sources, config: TrainConfig, tokenizer: AnyTokenizer, language_model: Any, longest_alike: int | None
) -> Validation | None:
    """Return the validation text, where there is one, once the model reads tokens and inputs of this run."""
    hugging_face.require_fits(language_model, tokenizer, config.longest_input)
    return Validation(sources.valid, config, tokenizer, longest_alike) if sources.valid else None


def _padded_to(config: TrainConfig, longest_alike: int | None) -> int | None:
    """Return the length of every row, or None where rows are padded to the longest of their micro-batch.

    Args:
        config: The run's.
        longest_alike: The longest input whose states do not depend on its length. Where the context is longer, every
            row is padded to the context, so that a loss is the same at every micro-batch size.
    """
    context = config.data.context_length
    is_length_felt = longest_alike is not None and context > longest_alike
    require(
        not (is_length_felt and config.data.attend_within_documents),
        f"--data.attend-within-documents is set and --data.context-length is {context}, but the model has other rotary "
        f"positions for inputs longer than {longest_alike} tokens, chosen by the longest document of a micro-batch; "
        f"use --data.context-length {longest_alike} or less, or --data.sample document.",
    )
    return context if is_length_felt or config.data.sample == "stream" else None


def _engine(model: torch.nn.Module, setup: Resolved, device: torch.device) -> Any:
    groups = parameter_groups(model.named_parameters(), setup.optim.weight_decay)
    device_type = "cpu" if setup.offload_optimizer else device.type
    optimizer = parallel.together(lambda: build_optimizer(groups, setup.optim, device_type=device_type))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=setup.engine_config, mpu=parallel.mpu())[0]


def _start_folder(config: TrainConfig, settings: dict[str, Any], events: Events) -> None:
    if not parallel.is_main():
        return
    config.run.dir.mkdir(parents=True, exist_ok=True)
    if config.run.fresh:
        resume.remove_all(config.run.dir)
        events.record("fresh", 0)
    write_config(config.run.dir, settings)


def _state(config: TrainConfig, engine: Any, identity: Identity, events: Events, max_steps: int) -> RunState:
    found = resume.find(config.run.dir)
    for name, reason in found.skipped:
        events.record("skipped checkpoint", 0, name=name, reason=reason)
    parallel.together(events.require_checkpoints, config.run.dir / "checkpoints")
    state = RunState()
    if found.folder is not None:
        state = resume.load(engine, found.folder, identity, config.checkpoint.allow_changed)
        if parallel.is_main():
            print(f"continues from {found.folder.name}, after {counted(state.step, 'step')}", flush=True)
        then, now = manifest.read_manifest(found.folder)["identity"], asdict(identity)
        for name in config.checkpoint.allow_changed:
            events.record("allowed change", state.step, name=name, then=then.get(name), now=now[name])
    if state.step < max_steps:
        parallel.together(events.require_progress, state.step)
    events.record("start", state.step, **job(), world_size=parallel.world_size())
    return state
