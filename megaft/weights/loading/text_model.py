"""Causal language models that are a part of a larger model, as of text and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaft.weights.loading.causal_lm import CausalLM


def require_causal_class(config: Any) -> None:
    """Raise ValueError where transformers makes no causal language model of a configuration, or one of several."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"it has no causal language model of model_type {config.model_type}; use a model of another family"
        )
    try:
        config.get_text_config()
    except ValueError as error:
        raise ValueError(f"model_type {config.model_type} has several text models; use a folder of one") from error


def keep_composite_config(model: CausalLM, source: str | None, folder: Path) -> None:
    """Write the source's whole config.json where transformers loads the model by that alone, and not by its text part.

    Args:
        model: The model that was saved, with the configuration of its text part (Emu3, Mllama).
        source: The model.path it is from.
        folder: Where it was saved.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if source is not None and type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
        whole.text_config = model.config
        whole.save_pretrained(folder)
