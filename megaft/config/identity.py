"""Fields of a run's identity: their settings in messages, and those that a resumed run may change on request.

Everything else may change freely between two starts, such as micro-batch, ZeRO stage, ranks, guards and logging.
"""

from __future__ import annotations

_MODEL = "--model.path (or --model.from-scratch)"

SETTINGS = {
    "global_batch_size": "train_batch_size of --deepspeed_config",
    "seed": "--run.seed",
    "data": "--data.train",
    "context_length": "--data.context-length",
    "sample": "--data.sample",
    "attend_within_documents": "--data.attend-within-documents",
    "tokenizer": "--data.tokenizer (or --model.path)",
    "model": f"{_MODEL}, trained parameters",
    "model_config": f"{_MODEL}, {{key}} of config.json",
    "model_weights": f"{_MODEL}, stored weights",
    "dropout": "--model.dropout",
    "lora": "--lora.{flag}",
    "optim": "--optim.{flag}",
    "schedule_steps": "--run.max-steps (or --run.epochs)",
    "gradient_clipping": "gradient_clipping of --deepspeed_config",
    "precision": "bf16 or fp16 of --deepspeed_config",
    "validation": "--data.valid (or --eval.*)",
}
"""Setting of each identity field in messages; {key} is a key of a field that is a dict, {flag} that key with dashes."""

CHANGEABLE = frozenset(SETTINGS) - {
    *("seed", "context_length", "sample", "attend_within_documents"),
    "model",
}
"""Fields that --checkpoint.allow-changed may list; other differences are always errors."""


def setting_of(field: str, key: str = "") -> str:
    """Return the setting that determines an identity field, or a key of a field that is a dict."""
    return SETTINGS[field].format(key=key, flag=key.replace("_", "-"))
