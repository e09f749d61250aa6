"""Build the model to train, wrapped in a module that returns the loss in nats."""

from __future__ import annotations

from typing import Any

from megaft.base import parallel
from megaft.base.agreement import together
from megaft.config.train import TrainConfig
from megaft.models import hugging_face, trials
from megaft.models.attention import attend_without_masks
from megaft.models.blocks import gather_whole_blocks
from megaft.models.compiled import compile_blocks


def build_model(config: TrainConfig, engine_config: dict[str, Any]) -> tuple[Any, str]:
    """Return the initial model, wrapped to return nats, and its architecture as recorded in checkpoints.

    Args:
        config: The run's settings.
        engine_config: Configuration for deepspeed.initialize, for its precision and ZeRO stage.
    """
    if config.model.backend == "megatron":
        parallel.start_tensor_parallelism(config.parallel.tensor_parallel_size)
        from megaft.models import megatron

        language_model = megatron.build(config.model, config.run.seed, engine_config)
        return megatron.MegatronNats(language_model), megatron.architecture(language_model)
    language_model = hugging_face.build(config.model, config.lora, config.run.seed, engine_config)
    model = together(nats_model, language_model, config.data.attend_within_documents)
    is_stage_3 = hugging_face.is_stage_3(engine_config)
    if is_stage_3:
        gather_whole_blocks(language_model)
    together(compile_blocks, language_model, config.model.compile, is_stage_3)
    return model, hugging_face.architecture(language_model)


def nats_model(language_model: Any, attend_within_documents: bool) -> hugging_face.NatsModel:
    """Return a language model wrapped to return nats, after checking its attention.

    Raises:
        DataError: The model attends to later tokens, or across documents despite attend_within_documents.
    """
    with trials.trial_model_of(language_model) as trial_model:
        trials.require_language_model(language_model, trial_model)
        if attend_within_documents:
            trials.require_document_isolation(language_model, trial_model)
        model = hugging_face.NatsModel(language_model, trial_model)
    attend_without_masks(language_model)  # after the trials, which depend on transformers' masks
    return model
