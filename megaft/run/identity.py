"""Identity of a run: the content of its model and data, and the settings that a resumed run must not change."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megaft.base.redaction import without_secrets
from megaft.checkpoint.run_state import Identity
from megaft.config.schedules import SCHEDULES
from megaft.config.train import LoraConfig, TrainConfig
from megaft.models.adapters import adapted_layers
from megaft.run.plan import Plan
from megaft.run.same_settings import UNREADABLE
from megaft.run.validation import Validation
from megaft.weights.identity import config_fields, fingerprint_of_weights, local_config
from megaft.weights.loading.pretrained import dropout_fields


def contents(plan: Plan) -> dict[str, Any]:
    """Return the content of the files that settings name, except the model's weights, by setting."""
    valid = plan.sources.valid
    return {
        "the content of --deepspeed_config": plan.setup.as_read,
        "the SHA-256 of --data.train": plan.samples.fingerprint,
        "the SHA-256 of --data.valid": valid.receipt["bin_sha256"] if valid else None,
        "the SHA-256 of --data.tokenizer (or --model.path)": plan.tokenizer.sha256,
        # Ranks that build a partitioned model of different shapes would wait for each other forever.
        f"the config.json of {_model_setting(plan.config)}": local_config(plan.config.model.source) or UNREADABLE,
    }


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Identity of the model that a run starts from."""

    architecture: str
    config: dict[str, Any]
    """Fields of its configuration, without dropout probabilities that --model.dropout sets."""
    weights: str | None
    """Fingerprint of pretrained weights; None for a model from scratch."""
    lora: dict[str, Any]

    def contents(self, config: TrainConfig) -> dict[str, Any]:
        """Return the values that must be equal on all ranks, by setting."""
        setting = _model_setting(config)
        return {f"the configuration of {setting}": self.config, f"the weights of {setting}": self.weights}


def loaded_model(config: TrainConfig, language_model: Any, architecture: str) -> LoadedModel:
    """Return the identity of a model that has been built.

    Raises:
        DataError: Its weights cannot be read again.
    """
    fields = config_fields(language_model.config.get_text_config().to_dict())
    for name in dropout_fields(fields, config.model.dropout):
        del fields[name]
    weights = fingerprint_of_weights(config.model.path) if config.model.path else None
    return LoadedModel(architecture, fields, weights, _lora(config.lora, language_model))


def _lora(lora: LoraConfig, language_model: Any) -> dict[str, Any]:
    """Return the settings of LoRA, with the names of the adapted layers, which PEFT may have chosen."""
    if not lora.rank:
        return {"rank": 0}
    targets = {name.rpartition(".")[2] for name, _ in adapted_layers(language_model)}
    return asdict(lora) | {"target_modules": " ".join(sorted(targets))}


def identity_of(plan: Plan, model: LoadedModel, validation: Validation | None) -> Identity:
    """Return the settings that must equal a checkpoint's when the run resumes."""
    config, optim = plan.config, plan.setup.optim
    return Identity(
        global_batch_size=plan.setup.global_batch_size,
        seed=config.run.seed,
        data=plan.samples.fingerprint,
        context_length=config.data.context_length,
        sample=config.data.sample,
        attend_within_documents=config.data.attend_within_documents,
        tokenizer=plan.tokenizer.sha256,
        model=model.architecture,
        dropout=config.model.dropout,
        optim=asdict(optim),
        schedule_steps=plan.max_steps if SCHEDULES[optim.schedule].decays else None,
        validation=validation.name if validation else None,
        gradient_clipping=plan.setup.gradient_clipping,
        precision=plan.setup.dtype,
        lora=model.lora,
        model_config=model.config,
        model_weights=model.weights,
        names=_names(config),
    )


def _names(config: TrainConfig) -> dict[str, str]:
    """Return readable names of the hashed fields of the run's identity."""
    names = {
        "data": " ".join(config.data.train),
        "tokenizer": config.tokenizer_source,
        "model": model_name(config),
        "model_weights": model_name(config),
        "validation": str(config.data.valid),
    }
    return {part: without_secrets(name) for part, name in names.items()}


def model_name(config: TrainConfig) -> str:
    """Return the source of the run's model, with secrets redacted."""
    return without_secrets(config.model.source)


def _model_setting(config: TrainConfig) -> str:
    return "--model.path" if config.model.path else "--model.from-scratch"
