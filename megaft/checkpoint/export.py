"""RUN/export: the trained model as a folder that transformers loads, with a card that says what was measured."""

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
        written = form(
            config, partial(canonical.transformers_view, checkpoint_folder), getattr(torch, dtype), tokenizer
        )
        written.write(temporary)
        tokenizer.save(temporary)
        require_same_ids(tokenizer, temporary)
        verified = written.verify(temporary, rows)
        card = model_card(config, step, verified)
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
