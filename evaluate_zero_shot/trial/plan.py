"""Plan of an evaluation: its data, and the trials of every model."""

from __future__ import annotations

from collections.abc import Mapping

from evaluate_zero_shot.config import EvaluateConfig
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol
from evaluate_zero_shot.tasks import TASKS, Task
from evaluate_zero_shot.texts.data_files import DataFile, find_data
from evaluate_zero_shot.trial.evaluate import Trial
from evaluate_zero_shot.trial.geometry import geometry
from evaluate_zero_shot.trial.prepared import prepare
from evaluate_zero_shot.trial.subject import Subject
from megaft.scoring.model import tokens_per_batch


def find_all_data(config: EvaluateConfig, environment: Mapping[str, str]) -> dict[tuple[str, str], DataFile]:
    """Return the file of every task under every protocol.

    Raises:
        DataError: One is not there, or is another task's.
    """
    return {
        (task, protocol): find_data(
            TASKS[task], "tokens" if PROTOCOLS[protocol].text == "tokens" else "raw", config.data, environment
        )
        for task in config.tasks
        for protocol in config.protocols
    }


def trial_of(
    config: EvaluateConfig, subject: Subject, task: Task, protocol: Protocol, stride: int | None, data: DataFile
) -> Trial:
    """Return a task in a model's tokens and windows.

    Raises:
        ConfigError: The protocol's windows do not fit the model.
        DataError: The data are not what the task needs.
    """
    cut = geometry(protocol, subject.scorer.context_limit, config.context_length, stride)
    automatic = tokens_per_batch(subject.scorer.config, cut.num_inputs, subject.device.type, subject.dtype)
    return Trial(
        task=task,
        cut=cut,
        data=data,
        limit_lines=config.limit,
        prepared=prepare(task, protocol, data, config.limit, subject.tokenizer, cut),
        tokens_per_batch=config.tokens_per_batch or automatic,
    )
