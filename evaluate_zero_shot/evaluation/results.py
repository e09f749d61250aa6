"""results.json: one entry for each model, task and protocol, with all that is needed to check its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluate_zero_shot.evaluation.limits import OVERFLOW_LABEL, is_capped
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol
from megaft.base.errors import DataError
from megaft.base.files import parse_json, write_json_atomic
from megaft.base.redaction import without_parents


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Entry of results.json: one model on one task under one protocol."""

    model: str
    """Hub name or path, as the user gave it; of an absolute path the last part, or RUN/export."""
    model_name: str
    """Last part of `model`."""
    num_parameters: int
    model_sha256: str
    """SHA-256 over the names and contents of the model's files."""
    tokenizer_sha256: str
    task: str
    task_title: str
    protocol: str
    detokenizer: str
    data_file: str
    data_name: str | None
    """Name of the published file with this SHA-256; None for any other file."""
    data_sha256: str
    limit_lines: int | None
    """Number of lines scored, if not all: such a result must not be published."""
    context_length: int
    stride: int
    is_protocol_default: bool
    """True if context length and stride are the protocol's defaults; for prompts, if none was truncated."""
    dtype: str
    tokens_per_batch: int
    nats: float
    """Negative log-likelihood of every scored token, summed."""
    num_scored_tokens: int
    num_tokenized_tokens: int
    num_original_tokens: int
    """len(text.strip().split(" ")): Megatron-LM's T_o."""
    num_words: int | None
    """Divisor of the nats in word perplexity, by the protocol's rule."""
    num_bytes: int | None
    """UTF-8 bytes of the original text."""
    num_documents: int
    headline: str
    """Main metric: one of the next five fields."""
    perplexity: float
    word_perplexity: float | None
    byte_perplexity: float | None
    bits_per_byte: float | None
    accuracy: float | None
    """Fraction from 0 to 1."""
    confidence_interval_95: dict[str, Any] | None
    """{"quantity", "low", "high", "method"} of the headline."""
    positions: list[tuple[int, int, float]]
    """Bins of positions in the window: first position, scored tokens, their nats."""
    segments: list[tuple[int, float]]
    """In text order: scored tokens, their nats."""
    segment_unit: str
    """Unit of a segment: "document", "documents" (several together) or "block"."""
    seconds: float
    """Seconds of scoring, in the command that finished it."""
    tokens_per_second: float | None
    """Scored tokens per second over all ranks (training's counts input tokens). None if an earlier command scored some
    of them."""
    world_size: int
    """Number of ranks."""
    backend: str
    """Model implementation: "hugging-face" or "megatron"."""
    tensor_parallel_size: int
    device: str
    command: list[str]
    """As given, but with absolute paths cut like `model`."""
    environment: dict[str, Any]
    """Versions, commit and hardware, from megaft.base.environment."""

    @property
    def identity(self) -> tuple[Any, ...]:
        """Key of a result; a later result with the same key replaces it."""
        return tuple(getattr(self, name) for name in _IDENTITY)


PROGRAM = "evaluate_zero_shot/__main__.py"
"""First word of the command `python -m evaluate_zero_shot`."""
_IDENTITY = (
    *("model", "model_sha256", "task", "data_sha256", "protocol"),
    *("context_length", "stride", "dtype", "limit_lines"),
)


def write(folder: Path, results: list[Result]) -> None:
    """Add results to results.json, which keeps earlier ones of other models, data, protocols or windows.

    Raises:
        ConfigError: The file cannot be written.
        DataError: The present file is not a results.json.
    """
    replaced = {result.identity for result in results}
    present = map(_without_folders, load(folder))
    earlier = [row for row in present if tuple(row[name] for name in _IDENTITY) not in replaced]
    rows = [*earlier, *map(asdict, results)]
    value = {
        "results": rows,
        "protocols": {name: asdict(PROTOCOLS[name]) for name in sorted({row["protocol"] for row in rows})},
    }
    write_json_atomic(folder / "results.json", value)


def public_command(words: Sequence[str]) -> list[str]:
    """Return a command without the folders of this machine; the evaluation program keeps the name of its package."""
    program = [PROGRAM if word.endswith(f"/{PROGRAM}") else without_parents(word) for word in words[:1]]
    return [*program, *map(without_parents, words[1:])]


def _without_folders(row: dict[str, Any]) -> dict[str, Any]:
    """Return an entry in the present form; older versions recorded absolute paths."""
    command = {"command": public_command(row["command"])} if row.get("command") else {}
    return row | {"model": without_parents(row["model"])} | command


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of results.json; none if there is no such file.

    Raises:
        DataError: The file was not written by megaft.
    """
    path = folder / "results.json"
    if not path.exists():
        return []
    try:
        rows = parse_json(path.read_text(encoding="utf-8"))["results"]
        if any(name not in row for row in rows for name in _IDENTITY):
            raise KeyError("an entry lacks a field")
        if any(not isinstance(row["model"], str) for row in rows):
            raise TypeError("the model of an entry is not a string")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a results file of megaft ({error}); move it away or give another --output."
        ) from error
    return rows


def note_on_guessing(result: Result, vocab_size: int) -> str | None:
    """Return a warning if a token costs a nat more than a uniform guess among all tokens, else None.

    That happens when model and tokenizer do not belong together, which nothing else reveals if the ids fit. A model
    with random weights is only a little worse than a guess.

    Args:
        result: The result.
        vocab_size: Number of tokens in the tokenizer's vocabulary.
    """
    if result.perplexity <= math.e * vocab_size:
        return None
    return (
        f"warning: {result.model_name} has a perplexity of {result.perplexity:,.0f} per token, worse than a guess "
        f"among the tokenizer's {vocab_size:,} tokens; is this the tokenizer the model was trained with?"
    )


def summary(result: Result) -> str:
    """Return a one-line summary of a result."""
    names = ("word_perplexity", "perplexity", "bits_per_byte", "accuracy")
    ordered = sorted(names, key=lambda name: name != result.headline)
    protocol = PROTOCOLS[result.protocol]
    values = [_written(name, value, protocol) for name in ordered if (value := getattr(result, name)) is not None]
    setting = f"{result.protocol}, context {result.context_length}, stride {result.stride}"
    return f"{result.model_name}  {result.task}  {setting}:  {'  '.join(values)}  ({result.seconds:.1f} s)"


def _written(name: str, value: float, protocol: Protocol) -> str:
    """Return a metric with its name; one that is a cap or an overflow is marked so."""
    if name.endswith("perplexity") and is_capped(value, protocol):
        return f"{name} {value:.4f} (the protocol's cap)"
    return f"{name} {value:.4f}" if math.isfinite(value) else f"{name} {OVERFLOW_LABEL}"
