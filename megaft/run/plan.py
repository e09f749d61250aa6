"""Plan a run: all checks and preparation that need neither other ranks nor a GPU, cheapest first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megaft.base.checks import require
from megaft.base.plural import counted
from megaft.base.progress import say
from megaft.base.redaction import without_secrets
from megaft.base.topology import Topology
from megaft.config.deepspeed_json import ResolvedSettings
from megaft.config.train import ModelConfig, OptimConfig, TrainConfig
from megaft.data.sequence import Samples
from megaft.data.tokenizer import AnyTokenizer, load_tokenizer
from megaft.run.settings import plan_settings
from megaft.run.sources import Sources, named_sources, open_samples, prepare_sources, require_same_tokenizer
from megaft.run.trackers import check_trackers
from megaft.weights.loading.pretrained import require_exists
from megaft.weights.megatron_folder import is_megatron_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Planned run: resolved settings, prepared data and number of steps."""

    config: TrainConfig
    setup: ResolvedSettings
    sources: Sources
    tokenizer: AnyTokenizer
    samples: Samples
    max_steps: int


def plan_run(config: TrainConfig, topology: Topology, *, has_cuda: bool) -> Plan:
    """Check a run's settings, prepare its data and load its tokenizer, without other ranks or a GPU.

    Args:
        config: The run's settings.
        topology: Rank and world size; the main rank prepares the data for all.
        has_cuda: True if the ranks have CUDA devices.

    Raises:
        UserError: The run cannot be built; the model itself is checked later.
    """
    check_trackers(config.metrics)
    setup = plan_settings(config, topology.world_size, has_cuda=has_cuda)
    require_inputs(config)
    say(without_secrets(f"preparing data: {' '.join(config.data.train)}"), topology.is_main)
    tokenizer = load_tokenizer(config.tokenizer_source)
    sources = prepare_sources(config.data, config.tokenizer_source, tokenizer, config.run.dir, topology)
    require_same_tokenizer(sources, tokenizer)
    samples = open_samples(sources, config.data, config.run.seed)
    return Plan(
        config=config,
        setup=setup,
        sources=sources,
        tokenizer=tokenizer,
        samples=samples,
        max_steps=_max_steps(config, setup, samples),
    )


def require_inputs(config: TrainConfig) -> None:
    """Refuse a model or data that do not exist, and a model that its backend cannot read.

    Raises:
        DataError: A file or folder is missing.
        ConfigError: A setting names it wrongly.
    """
    if config.model.path is not None:
        require_exists(config.model.path)
        _require_readable(config.model, config.model.path)
    named_sources(config.data)


def _require_readable(model: ModelConfig, path: str) -> None:
    require(
        model.backend == "megatron" or not is_megatron_folder(Path(path)),
        f"--model.path is {path}, which is in megatron's format. Set --model.backend megatron, or "
        "convert it with megaft convert --format hugging-face.",
    )


def _max_steps(config: TrainConfig, setup: ResolvedSettings, samples: Samples) -> int:
    max_steps = config.run.max_steps or samples.num_steps(config.run.epochs or 1, setup.global_batch_size)
    require(
        setup.total_num_steps in (None, max_steps),
        f"scheduler.params.total_num_steps is {setup.total_num_steps} in --deepspeed_config, but the run has "
        f"{counted(max_steps, 'step')}; set --run.max-steps {setup.total_num_steps} and no --run.epochs, or remove "
        "total_num_steps.",
    )
    require_warmup_fits(config.optim, setup.optim.warmup_steps, max_steps)
    return max_steps


def require_warmup_fits(flags: OptimConfig, warmup_steps: int, max_steps: int) -> None:
    """Refuse a warmup that is longer than the run.

    Args:
        flags: The optimizer's settings of the command line.
        warmup_steps: Steps of the run's warmup, which the DeepSpeed JSON may set.
        max_steps: Steps of the run.

    Raises:
        ConfigError: The message names the setting that gives the steps: the flag, or the JSON's scheduler.
    """
    is_flag = flags.warmup_steps == warmup_steps
    setting = "--optim.warmup-steps" if is_flag else "warmup_num_steps of the scheduler in --deepspeed_config"
    default = "" if is_flag else " (DeepSpeed's default is 1000)"
    require(
        warmup_steps <= max_steps,
        f"{setting} is {warmup_steps}{default}, but the run has {counted(max_steps, 'step')}; set it to at most that, "
        f"for example {max_steps // 10}.",
    )
