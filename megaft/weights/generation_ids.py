"""Beginning, end and padding tokens of generation: as a model's own files say, or as the tokenizer of a new model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaft.base.errors import REPORT, DataError

GENERATION = "generation_config.json"
KINDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def follow_tokenizer(config: Any, bos_id: int | None, eos_id: int | None) -> None:
    """Give a new model's configuration its tokenizer's beginning and end, where it does not have them already.

    An end may be several tokens; one of them must be the tokenizer's, with which training ended documents.
    """
    text = config.get_text_config()
    for kind, token in (("bos_token_id", bos_id), ("eos_token_id", eos_id)):
        if token not in _several(getattr(text, kind, None)):
            setattr(text, kind, token)


def generation_ids(folder: str | Path) -> dict[str, set[int]]:
    """Return the tokens of each kind by which transformers begins and ends texts with a model's folder or hub name."""
    from transformers import AutoConfig, GenerationConfig

    from megaft.weights.reading import file_of

    if file_of(str(folder), GENERATION):
        return ids_of(GenerationConfig.from_pretrained(folder))
    return ids_of(GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=False)))


def ids_of(config: Any) -> dict[str, set[int]]:
    """Return the tokens of each kind in a configuration of generation or of a model."""
    return {kind: _several(getattr(config, kind, None)) for kind in KINDS}


def require_same_generation_ids(expected: dict[str, set[int]], found: dict[str, set[int]], folder: Path) -> None:
    """Raise DataError where an export would begin, end or pad texts with other tokens than expected."""
    for kind in KINDS:
        if found[kind] != expected[kind]:
            raise DataError(
                f"{folder} was not published: its {kind} is {sorted(found[kind])} for transformers, not "
                f"{sorted(expected[kind])} as the model that was trained. The checkpoint is whole; {REPORT}."
            )


def _several(ids: Any) -> set[int]:
    if ids is None:
        return set()
    return {*ids} if isinstance(ids, list | tuple) else {ids}
