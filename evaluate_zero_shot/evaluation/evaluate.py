"""Score one model on one task by one protocol, and compute the result."""

from __future__ import annotations

import hashlib
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers

from evaluate_zero_shot.evaluation import metrics
from evaluate_zero_shot.evaluation.evaluated_model import EvaluatedModel
from evaluate_zero_shot.evaluation.finished import FinishedBatches
from evaluate_zero_shot.evaluation.limits import is_capped
from evaluate_zero_shot.evaluation.plan import Evaluation
from evaluate_zero_shot.evaluation.results import Result, public_command
from megaft.base import parallel
from megaft.base.dtypes import dtype_name
from megaft.base.environment import environment
from megaft.base.progress import progress_bar
from megaft.base.redaction import without_parents, without_secrets
from megaft.models.rope import length_limit
from megaft.scoring.score import Score, batches_of, score

ARITHMETIC = 4
"""Incremented when the same batch gives other bits, so that a folder never mixes both.

2: torch's fused RMSNorm. 3: half-precision products in fp32 on CPUs without fast instructions for them.
4: larger chunks of logits on CPUs.
"""


def evaluate(evaluated: EvaluatedModel, evaluation: Evaluation, output: Path) -> Result:
    """Score a model on all ranks.

    Args:
        evaluated: The model.
        evaluation: Task, protocol, data and windows.
        output: Folder of results; finished batches are kept in `output`/windows.

    Raises:
        NumericsError: Nats of a scored token are not finite.
    """
    finished = FinishedBatches(output / "windows" / _key(evaluated, evaluation), parallel.data_parallel_rank())
    begin = time.perf_counter()
    scored = _score(evaluated, evaluation, finished)
    seconds = time.perf_counter() - begin
    prepared, protocol, versions = evaluation.prepared, evaluation.geometry.protocol, environment()
    headline = protocol.headline if protocol.headline and not prepared.is_prompted else evaluation.task.headline
    values = metrics.metrics(scored, prepared, protocol)
    return Result(
        model=without_secrets(without_parents(evaluated.source)),
        model_name=Path(evaluated.source).name,
        num_parameters=evaluated.scorer.num_parameters,
        model_sha256=evaluated.sha256,
        tokenizer_sha256=evaluated.tokenizer.sha256,
        task=evaluation.task.name,
        task_title=evaluation.task.title,
        protocol=protocol.name,
        detokenizer=prepared.detokenizer,
        data_file=evaluation.data.path.name,
        data_name=evaluation.data.name,
        data_sha256=evaluation.data.sha256,
        limit_lines=evaluation.limit_lines,
        context_length=evaluation.geometry.context_length,
        stride=evaluation.geometry.stride,
        is_protocol_default=evaluation.geometry.is_default or prepared.has_untruncated_prompts,
        dtype=dtype_name(evaluated.dtype),
        tokens_per_batch=evaluation.tokens_per_batch,
        num_tokenized_tokens=len(prepared.tokens.tokens),
        num_original_tokens=prepared.num_original_tokens,
        num_words=prepared.num_words,
        num_bytes=prepared.num_bytes,
        num_documents=len(prepared.tokens.document_offsets) - 1,
        headline=headline,
        confidence_interval_95=metrics.interval(
            headline, values[headline], scored, prepared, is_capped(values[headline], protocol)
        ),
        positions=metrics.positions(scored, prepared.rows, evaluation.geometry.num_inputs),
        seconds=seconds,
        tokens_per_second=None if finished.finished else scored.num_scored_tokens / seconds,
        world_size=parallel.world_size(),
        backend=evaluated.backend,
        tensor_parallel_size=parallel.tensor_parallel_size(),
        device=torch.cuda.get_device_name() if evaluated.device.type == "cuda" else evaluated.device.type,
        command=public_command(versions.pop("command")),
        environment=versions,
        **values,
        **metrics.segments(scored, prepared),
    )


def _score(evaluated: EvaluatedModel, evaluation: Evaluation, finished: FinishedBatches) -> Score:
    prepared = evaluation.prepared
    model = evaluated.scorer.configure(with_greedy=prepared.is_prompted, banned=prepared.banned)
    geometry = evaluation.geometry
    name = f"{Path(evaluated.source).name}, {evaluation.task.name}, {geometry.protocol.name}, stride {geometry.stride}"
    num_inputs = sum(row.num_inputs for row in prepared.rows)
    with progress_bar(num_inputs, "tokens", f"{name}:", is_shown=parallel.is_main()) as progress:
        return score(
            prepared.tokens,
            prepared.rows,
            model,
            tokens_per_batch=evaluation.tokens_per_batch,
            device=evaluated.device,
            prefix_id=prepared.prefix_id,
            num_words=prepared.num_words,
            num_bytes=prepared.num_bytes,
            name=name,
            store=finished,
            rope_length_limit=length_limit(evaluated.scorer.config),
            progress=progress,
        )


def _key(evaluated: EvaluatedModel, evaluation: Evaluation) -> str:
    """Return a hash of everything that affects a batch's nats: tokens, batches, model and libraries."""
    prepared = evaluation.prepared
    digest = hashlib.sha256()
    batches = batches_of(
        prepared.rows, evaluation.tokens_per_batch, evaluated.device.type, length_limit(evaluated.scorer.config)
    )
    rows = np.array(
        [(number, row.first, *row.window) for number, batch in enumerate(batches) for row in batch.rows], np.int64
    )
    for part in (prepared.tokens.tokens, rows, np.array(prepared.banned, np.int64)):
        digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    computed_by = (
        ARITHMETIC,
        evaluated.sha256,
        evaluated.dtype,
        evaluated.device.type,
        torch.__version__,
        transformers.__version__,
    )
    if evaluated.device.type == "cpu":  # its instructions choose the kernels, which round differently
        computed_by = (*computed_by, torch.backends.cpu.get_cpu_capability())
    if evaluated.backend == "megatron":
        computed_by = (*computed_by, version("megatron-core"), parallel.tensor_parallel_size())
    digest.update(repr((*computed_by, prepared.prefix_id, prepared.is_prompted)).encode())
    return digest.hexdigest()[:16]
