"""Score one model on one trial, and compute its result."""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

from evaluate_zero_shot.trial import figures
from evaluate_zero_shot.trial.finished import FinishedBatches
from evaluate_zero_shot.trial.limits import is_capped
from evaluate_zero_shot.trial.plan import Trial
from evaluate_zero_shot.trial.results import Result
from evaluate_zero_shot.trial.subject import Subject
from megaft.base import parallel
from megaft.base.dtypes import dtype_name
from megaft.base.environment import environment
from megaft.base.progress import progress_bar
from megaft.base.redaction import without_secrets
from megaft.models.rope import length_limit
from megaft.scoring.score import Score, batches_of, score


def evaluate(subject: Subject, trial: Trial, output: Path) -> Result:
    """Score a model on one trial, on all ranks.

    Args:
        subject: The model.
        trial: Task, protocol, data and windows.
        output: Folder of results; finished batches are kept in `output`/windows.

    Raises:
        NumericsError: Nats of a scored token are not finite.
    """
    finished = FinishedBatches(output / "windows" / _key(subject, trial), parallel.data_parallel_rank())
    begin = time.perf_counter()
    scored = _score(subject, trial, finished)
    seconds = time.perf_counter() - begin
    prepared, protocol, versions = trial.prepared, trial.geometry.protocol, environment()
    headline = protocol.headline if protocol.headline and not prepared.is_prompted else trial.task.headline
    values = figures.figures(scored, prepared, protocol)
    return Result(
        model=without_secrets(subject.source),
        model_name=Path(subject.source).name,
        num_parameters=subject.scorer.num_parameters,
        model_sha256=subject.sha256,
        tokenizer_sha256=subject.tokenizer.sha256,
        task=trial.task.name,
        task_title=trial.task.title,
        protocol=protocol.name,
        detokenizer=prepared.detokenizer,
        data_file=trial.data.path.name,
        data_name=trial.data.name,
        data_sha256=trial.data.sha256,
        limit_lines=trial.limit_lines,
        context_length=trial.geometry.context_length,
        stride=trial.geometry.stride,
        is_protocol_default=trial.geometry.is_default or prepared.has_untruncated_prompts,
        dtype=dtype_name(subject.dtype),
        tokens_per_batch=trial.tokens_per_batch,
        num_tokenized_tokens=len(prepared.tokens.tokens),
        num_original_tokens=prepared.num_original_tokens,
        num_words=prepared.num_words,
        num_bytes=prepared.num_bytes,
        num_documents=len(prepared.tokens.document_offsets) - 1,
        headline=headline,
        confidence_interval_95=figures.interval(
            headline, values[headline], scored, prepared, is_capped(values[headline], protocol)
        ),
        positions=figures.positions(scored, prepared.rows, trial.geometry.num_inputs),
        seconds=seconds,
        tokens_per_second=None if finished.finished else scored.num_scored_tokens / seconds,
        world_size=parallel.world_size(),
        backend=subject.backend,
        tensor_parallel_size=parallel.tensor_parallel_size(),
        device=torch.cuda.get_device_name() if subject.device.type == "cuda" else subject.device.type,
        command=versions.pop("command"),
        environment=versions,
        **values,
        **figures.segments(scored, prepared),
    )


def _score(subject: Subject, trial: Trial, finished: FinishedBatches) -> Score:
    prepared = trial.prepared
    model = subject.scorer.configure(with_greedy=prepared.is_prompted, banned=prepared.banned)
    geometry = trial.geometry
    name = f"{Path(subject.source).name}, {trial.task.name}, {geometry.protocol.name}, stride {geometry.stride}"
    num_inputs = sum(row.num_inputs for row in prepared.rows)
    with progress_bar(num_inputs, "tokens", f"{name}:", is_shown=parallel.is_main()) as progress:
        return score(
            prepared.tokens,
            prepared.rows,
            model,
            tokens_per_batch=trial.tokens_per_batch,
            device=subject.device,
            prefix_id=prepared.prefix_id,
            num_words=prepared.num_words,
            num_bytes=prepared.num_bytes,
            name=name,
            store=finished,
            rope_length_limit=length_limit(subject.scorer.config),
            progress=progress,
        )


def _key(subject: Subject, trial: Trial) -> str:
    """Return a hash of everything that affects a batch's nats: tokens, batches, model and libraries."""
    prepared = trial.prepared
    digest = hashlib.sha256()
    batches = batches_of(prepared.rows, trial.tokens_per_batch, length_limit(subject.scorer.config))
    rows = np.array(
        [(number, row.first, *row.window) for number, batch in enumerate(batches) for row in batch], np.int64
    )
    for part in (prepared.tokens.tokens, rows, np.array(prepared.banned, np.int64)):
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    computed_by = (subject.sha256, subject.dtype, subject.device.type, torch.__version__, transformers.__version__)
    if subject.backend == "megatron":
        computed_by = (*computed_by, version("megatron-core"), parallel.tensor_parallel_size())
    digest.update(repr((*computed_by, prepared.prefix_id, prepared.is_prompted)).encode())
    return digest.hexdigest()[:16]
