"""Export of the trained model to RUN/export: a folder that transformers loads, with a model card."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from megaft.base.errors import UserError
from megaft.base.files import fsync, naming_disk_errors
from megaft.checkpoint.export_check import Rows
from megaft.checkpoint.export_formats import HuggingFaceExport, MegatronExport
from megaft.checkpoint.model_card import model_card
from megaft.checkpoint.run_state import RunState
from megaft.config.train import TrainConfig
from megaft.data.tokenizer import AnyTokenizer
from megaft.data.tokenizer_check import require_same_ids
from megaft.weights import canonical, manifest


def export(config: TrainConfig, state: RunState, tokenizer: AnyTokenizer, dtype: str, rows: Rows) -> Path:
    """Export the best checkpoint, or the last if requested or if there was no validation; return the folder.

    The weights are those that the engine computed with: fp32 rounded to the run's dtype, adapters merged. The export is
    published only if plain transformers loads the trained model from it. Otherwise an earlier export stays.
    Runs on one rank, without a process group.

    Args:
        config: The run's settings.
        state: Progress of the run.
        tokenizer: Tokenizer to export with the model.
        dtype: Dtype of the run.
        rows: Held-out tokens, on which the loaded export is compared with the trained model.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ConfigError: The folder cannot be written.
        DataError: The export would tokenize, begin or end texts differently than the run's model.
        NumericsError: The export's nats differ from the trained model's.
    """
    step = state.step if config.run.export == "last" or state.best_step is None else state.best_step
    checkpoint_folder = manifest.folder_of(config.run.dir, step)
    final = config.run.dir / "export"
    temporary, old = final.with_name("export.tmp"), final.with_name("export.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    with naming_disk_errors(final), _removed_on_error(temporary):
        temporary.mkdir()
        exporter_class = MegatronExport if config.model.backend == "megatron" else HuggingFaceExport
        open_checkpoint = partial(canonical.transformers_view, checkpoint_folder)
        exporter = exporter_class(config, open_checkpoint, getattr(torch, dtype), tokenizer)
        exporter.write(temporary)
        tokenizer.save(temporary)
        require_same_ids(tokenizer, temporary)
        verified = exporter.verify(temporary, rows)
        card = model_card(config, tokenizer.sha256, step, verified)
        (temporary / "README.md").write_text(card, "utf-8", "backslashreplace")
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
