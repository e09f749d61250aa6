"""Causal language models inside composite models, such as vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaft.weights.loading.causal_lm import CausalLM


def require_causal_class(config: Any) -> None:
    """Raise ValueError unless transformers has exactly one causal language model for a configuration."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no causal language model of model_type {config.model_type}; use another model family"
        )
    try:
        config.get_text_config()
    except ValueError as error:
        raise ValueError(
            f"model_type {config.model_type} has several text models; give the folder of one of them"
        ) from error


def keep_composite_config(model: CausalLM, source: str | None, folder: Path) -> None:
    """Save the source's composite config.json if transformers cannot load the model from the text configuration alone.

    Args:
        model: The saved model, with the configuration of its text model (Emu3, Mllama).
        source: Its --model.path.
        folder: Folder it was saved to.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if source is not None and type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        whole = AutoConfig.from_pretrained(source, trust_remote_code=False)
        whole.text_config = model.config
        whole.save_pretrained(folder)
