"""Beginning, end and padding token ids of generation, from a model's files or a new model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaft.base.errors import REPORT, DataError

GENERATION = "generation_config.json"
KINDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def follow_tokenizer(config: Any, bos_id: int | None, eos_id: int | None) -> None:
    """Set a new model's bos_token_id and eos_token_id to the tokenizer's, unless it already lists that id.

    There may be several end tokens; one must be the tokenizer's, which ends the training documents.
    """
    text = config.get_text_config()
    for kind, token in (("bos_token_id", bos_id), ("eos_token_id", eos_id)):
        if token not in _id_set(getattr(text, kind, None)):
            setattr(text, kind, token)


def generation_ids(folder: str | Path) -> dict[str, set[int]]:
    """Return the token ids of each kind that transformers uses to generate with a model folder or hub name."""
    from transformers import AutoConfig, GenerationConfig

    from megaft.weights.reading import file_of

    if file_of(str(folder), GENERATION):
        return ids_of(GenerationConfig.from_pretrained(folder))
    return ids_of(GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)))


def ids_of(config: Any) -> dict[str, set[int]]:
    """Return the token ids of each kind in a generation or model configuration."""
    return {kind: _id_set(getattr(config, kind, None)) for kind in KINDS}


def require_same_generation_ids(expected: dict[str, set[int]], actual: dict[str, set[int]], folder: Path) -> None:
    """Refuse an export whose beginning, end or padding tokens differ from the expected ones."""
    for kind in KINDS:
        if actual[kind] != expected[kind]:
            raise DataError(
                f"{folder} was not published: its {kind} is {sorted(actual[kind])} in transformers, but "
                f"{sorted(expected[kind])} in the trained model. The checkpoint is complete; {REPORT}."
            )


def _id_set(ids: Any) -> set[int]:
    if ids is None:
        return set()
    return {*ids} if isinstance(ids, list | tuple) else {ids}
