"""Plan of an evaluation: the data of every task and protocol, and the evaluations of every model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from evaluate_zero_shot.config import EvaluateConfig
from evaluate_zero_shot.evaluation.evaluated_model import EvaluatedModel
from evaluate_zero_shot.evaluation.geometry import Geometry, resolve_geometry
from evaluate_zero_shot.evaluation.prepared import PreparedTask, prepare
from evaluate_zero_shot.protocols import PROTOCOLS
from evaluate_zero_shot.tasks import TASKS, Task
from evaluate_zero_shot.texts.data_files import DataFile, find_data
from megaft.scoring.model import tokens_per_batch

Data = Mapping[tuple[str, str], DataFile]
"""Data file by task and protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Task, data and windows for one model under one protocol and stride."""

    task: Task
    geometry: Geometry
    data: DataFile
    limit_lines: int | None
    prepared: PreparedTask
    tokens_per_batch: int
    """Maximum input tokens of a forward pass."""


def find_all_data(config: EvaluateConfig, environment: Mapping[str, str]) -> Data:
    """Return the data file of every task under every protocol.

    Raises:
        DataError: A file is missing, or belongs to another task.
    """
    return {
        (task, protocol): find_data(TASKS[task], PROTOCOLS[protocol].file_text, config.data, environment)
        for task in config.tasks
        for protocol in config.protocols
    }


def geometries(config: EvaluateConfig, evaluated: EvaluatedModel) -> list[Geometry]:
    """Return the windows of every protocol and stride for a model.

    Raises:
        ConfigError: A protocol's windows do not fit the model.
    """
    return [
        resolve_geometry(PROTOCOLS[protocol], evaluated.scorer.context_limit, config.context_length, stride)
        for protocol in config.protocols
        for stride in config.strides
    ]


def evaluation_of(
    config: EvaluateConfig, evaluated: EvaluatedModel, task: Task, geometry: Geometry, data: DataFile
) -> Evaluation:
    """Return a task's data, tokenized and windowed for a model.

    Raises:
        DataError: The data do not suit the task.
    """
    automatic = tokens_per_batch(evaluated.scorer.config, geometry.num_inputs, evaluated.device.type, evaluated.dtype)
    return Evaluation(
        task=task,
        geometry=geometry,
        data=data,
        limit_lines=config.limit,
        prepared=prepare(task, geometry.protocol, data, config.limit, evaluated.tokenizer, geometry),
        tokens_per_batch=config.tokens_per_batch or automatic,
    )
