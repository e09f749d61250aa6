"""RUN/export: the trained model as a folder that transformers loads, with a card that says what was measured."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from megaft.base.errors import UserError
from megaft.base.files import fsync, json_lines, naming_disk_errors
from megaft.base.plural import counted
from megaft.base.redaction import without_secrets
from megaft.checkpoint.export_check import Rows
from megaft.checkpoint.export_formats import HuggingFaceExport, MegatronExport
from megaft.checkpoint.run_state import RunState
from megaft.config.train import TrainConfig
from megaft.data.tokenizer import AnyTokenizer
from megaft.data.tokenizer_check import require_same_ids
from megaft.weights import canonical, manifest


def export(config: TrainConfig, state: RunState, tokenizer: AnyTokenizer, dtype: str, rows: Rows) -> Path:
    """Write the best checkpoint, or the last if there was no validation or it is asked for; return its folder.

    The weights are the ones the engine computed with: fp32 ones rounded to the run's dtype, adapters merged. Before it
    gets its name, plain transformers must find the trained model in it.
    It reads the checkpoint on one rank and needs no process group.

    Args:
        config: The run's settings.
        state: Where the run is.
        tokenizer: What is exported beside the model.
        dtype: That of the run.
        rows: Held-out tokens, on which the loaded export is compared with the trained model.

    Raises:
        CheckpointError: The checkpoint does not hold.
        ConfigError: The disk refuses.
        DataError: The export would tokenize, or end texts, otherwise than the run's model.
        NumericsError: The export is not the trained model. An export that was there stays, whatever is wrong.
    """
    step = state.step if config.run.export == "last" or state.best_step is None else state.best_step
    checkpoint_folder = manifest.folder_of(config.run.dir, step)
    final = config.run.dir / "export"
    temporary, old = final.with_name("export.tmp"), final.with_name("export.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with naming_disk_errors(final), _removed_on_error(temporary):
        temporary.mkdir()
        form = MegatronExport if config.model.backend == "megatron" else HuggingFaceExport
        written = form(config, partial(canonical.canonical, checkpoint_folder), getattr(torch, dtype), tokenizer)
        written.write(temporary)
        tokenizer.save(temporary)
        require_same_ids(tokenizer, temporary)
        verified = written.verify(temporary, rows)
        card = model_card(config, step, verified)
        (temporary / "README.md").write_text(without_secrets(card), "utf-8", "backslashreplace")
        for path in (temporary, *temporary.rglob("*")):
            fsync(path)
        if final.exists():
            final.rename(old)
        temporary.rename(final)
        fsync(config.run.dir)
    shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def model_card(config: TrainConfig, step: int, verified: str) -> str:
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
        f"{base}, finetuned for {counted(step, 'step')} with megaft on {' '.join(config.data.train)}; "
        f"seed {config.run.seed}.",
        "`config.json` of the run's folder has every setting, and `metrics.jsonl` every step.",
    ]
    if validations:
        lines += [
            "",
            *_table({"before": validations.get(0), f"step {step}": validations.get(step)}),
            "",
            _protocol(config),
        ]
    return "\n".join([*lines, "", verified]) + "\n"


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
