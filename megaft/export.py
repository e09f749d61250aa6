"""RUN/export: the trained model as a folder that transformers loads, with a card that says what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megaft import checkpoint
from megaft.canonical import Canonical
from megaft.config import TrainConfig
from megaft.engine_state import WEIGHT
from megaft.files import fsync, json_lines, naming_disk_errors
from megaft.masking import without_secrets
from megaft.models import adapters, convert, hugging_face
from megaft.models.weights import Weights, file_of, load_config, open_weights, shapes_of
from megaft.run_state import RunState
from megaft.tokenizer import AnyTokenizer


def export(config: TrainConfig, state: RunState, tokenizer: AnyTokenizer, dtype: str) -> Path:
    """Write the best checkpoint, or the last if there was no validation or it is asked for; return its folder.

    The weights are the ones the engine computed with: fp32 ones rounded to the run's dtype, adapters merged.
    It reads the checkpoint on one rank and needs no process group.

    Raises:
        CheckpointError: The checkpoint does not hold.
        ConfigError: The disk refuses. An export that was there stays.
    """
    step = state.step if config.run.export == "last" or state.best_step is None else state.best_step
    saved = partial(checkpoint.canonical, checkpoint.folder_of(config.run.dir, step))
    final = config.run.dir / "export"
    temporary, old = final.with_name("export.tmp"), final.with_name("export.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with naming_disk_errors(final):
        temporary.mkdir()
        write = _write_megatron if config.model.backend == "megatron" else _write_hugging_face
        write(config, saved, getattr(torch, dtype), temporary)
        tokenizer.save(temporary)
        (temporary / "README.md").write_text(without_secrets(model_card(config, step)), encoding="utf-8")
        for path in (temporary, *temporary.rglob("*")):
            fsync(path)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        fsync(config.run.dir)
    shutil.rmtree(old, ignore_errors=True)
    return final


def _write_hugging_face(
    config: TrainConfig, saved: Callable[[Any], Canonical], dtype: torch.dtype, folder: Path
) -> None:
    model = hugging_face.build(config.model, config.lora, config.run.seed)
    load_weights(model, saved(model.config))
    try:
        if config.lora.rank:
            adapters.save_adapters(model, folder / "adapter", config.model.path)
            model = adapters.merge_adapters(model)
        model.to(dtype).save_pretrained(folder)
    except SafetensorError as error:  # as which safetensors passes on what the disk refuses
        raise OSError(str(error)) from error


def load_weights(model: torch.nn.Module, saved: Canonical) -> None:
    """Put a checkpoint's fp32 weights into a language model of the run's architecture."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(saved.read(name, WEIGHT))


def _write_megatron(config: TrainConfig, saved: Callable[[Any], Canonical], dtype: torch.dtype, folder: Path) -> None:
    """Write parameter by parameter: no rank had the whole model, and neither may this one have room for it."""
    source = config.model.path or config.model.from_scratch
    assert source is not None
    architecture = open_weights(source).config if config.model.path else load_config(source)
    hugging_face.set_dropout(architecture, config.model.dropout)
    read = partial(saved(architecture).read, kind=WEIGHT)
    weights = Weights(architecture, torch.float32, shapes_of(architecture), read)
    convert.write_hugging_face(weights, folder, dtype)
    has_files = config.model.path is not None and not source.endswith(".gguf")
    if has_files and (generation := file_of(source, "generation_config.json")):
        shutil.copyfile(generation, folder / generation.name)


def model_card(config: TrainConfig, step: int) -> str:
    """Return the card: where the model came from and what was measured before and after."""
    rows = json_lines(config.run.dir / "metrics.jsonl")
    validations = {row["step"]: row["validation"] for row in rows if "validation" in row}
    base = config.model.path or f"{config.model.from_scratch} (from scratch)"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {config.run.dir.resolve().name}",
        "",
        f"{base}, finetuned for {step} steps with megaft on {' '.join(config.data.train)}; seed {config.run.seed}.",
        "`config.json` of the run's folder has every setting, and `metrics.jsonl` every step.",
    ]
    if validations:
        lines += [
            "",
            *_table({"before": validations.get(0), f"step {step}": validations.get(step)}),
            "",
            _protocol(config),
        ]
    return "\n".join(lines) + "\n"


def _table(columns: dict[str, dict | None]) -> list[str]:
    known = {name: values for name, values in columns.items() if values}
    quantities = dict.fromkeys(quantity for values in known.values() for quantity in values)
    rows = [[quantity, *(_shown(values[quantity]) for values in known.values())] for quantity in quantities]
    return [f"| {' | '.join(row)} |" for row in (["validation", *known], ["---"] * (len(known) + 1), *rows)]


def _shown(value: float | int | str) -> str:
    """A float in six digits; a count in all of its own, and what is not finite as JSON has it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _protocol(config: TrainConfig) -> str:
    return (
        f"Measured on {config.data.valid}: windows of {config.eval_context_length} tokens, "
        f"stride {config.eval_stride}, a prefix token before each document, every token scored once; "
        "words and bytes are the original text's."
    )
