"""Model card of an export: sources of the model and data, and validation before and after training.

A card may be published, so it names models and texts by hub name or by file name and SHA-256, never by local path.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megaft.base.files import sha256_of, step_rows
from megaft.base.plural import counted
from megaft.base.redaction import without_folders, without_secrets
from megaft.config.data_source import parse_source
from megaft.config.train import TrainConfig
from megaft.data.indexed import with_suffix
from megaft.data.receipt import is_prepared, load_receipt
from megaft.weights.provenance import sha256_of_model


def model_card(config: TrainConfig, tokenizer_sha256: str, step: int, verified: str) -> str:
    """Return the card.

    Args:
        config: The run's settings.
        tokenizer_sha256: Hash of the run's tokenizer, as in receipts of data and in results.json.
        step: Steps of the exported checkpoint.
        verified: Sentence about the verification of the export.
    """
    rows = step_rows(config.run.dir / "metrics.jsonl")
    validations = {row["step"]: row["validation"] for row in rows if "validation" in row}
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {config.run.dir.resolve().name}",
        "",
        f"{_base(config)}, finetuned for {counted(step, 'step')} with megaft on "
        f"{' '.join(map(_weighted_name, config.data.train))}; seed {config.run.seed}.",
        "In the run's folder, `config.json` has every setting and `metrics.jsonl` every step.",
        "",
        *_markdown(["source", "name", "SHA-256"], _sources(config, tokenizer_sha256)),
    ]
    if validations:
        columns = {"before": validations.get(0), f"step {step}": validations.get(step)}
        lines += ["", *_measured(columns), "", _protocol(config)]
    return without_secrets("\n".join([*lines, "", verified]) + "\n")


def _base(config: TrainConfig) -> str:
    """Return the name of the model that the run started from."""
    if config.model.path is not None:
        return _file_name(config.model.path)
    return f"{_file_name(str(config.model.from_scratch))} (from scratch)"


def _file_name(source: str) -> str:
    """Return the last component of a local path, or a hub name unchanged."""
    return Path(source).absolute().name if Path(source).exists() else without_folders(source)


def _weighted_name(source: str) -> str:
    weight, name = parse_source(source)
    return Path(name).name if weight is None else f"{weight:g},{Path(name).name}"


def _sources(config: TrainConfig, tokenizer_sha256: str) -> Iterator[list[str]]:
    """Yield the kind, name and SHA-256 of each of the run's inputs."""
    source = config.model.source
    yield ["model" if config.model.path else "architecture", _file_name(source), _sha256_of_source(source)]
    yield ["tokenizer", _file_name(config.tokenizer_source), f"{tokenizer_sha256} (vocabulary and rules)"]
    for _, name in map(parse_source, config.data.train):
        yield ["training data", *_named_file(name)]
    if config.data.valid:
        yield ["validation data", *_named_file(config.data.valid)]


def _sha256_of_source(source: str) -> str:
    return sha256_of(Path(source)) if Path(source).is_file() else f"{sha256_of_model(source)} (all files)"


def _named_file(name: str) -> tuple[str, str]:
    """Return the file name and SHA-256 of a text file, or of the tokens of a prepared dataset."""
    if is_prepared(name):
        return with_suffix(name, ".bin").name, load_receipt(name)["bin_sha256"]
    path = Path(name)
    return path.name, sha256_of(path) if path.is_file() else "removed during the run"


def _measured(columns: dict[str, dict | None]) -> list[str]:
    known = {name: values for name, values in columns.items() if values}
    quantities = dict.fromkeys(quantity for values in known.values() for quantity in values)
    rows = ([quantity, *(_shown(values[quantity]) for values in known.values())] for quantity in quantities)
    return _markdown(["validation", *known], rows)


def _markdown(names: list[str], rows: Iterator[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def _shown(value: float | int | str) -> str:
    """Return a float with six digits, or an integer or string in full."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _protocol(config: TrainConfig) -> str:
    return (
        f"Measured on {Path(str(config.data.valid)).name}: windows of {config.eval_context_length} tokens, "
        f"stride {config.eval_stride}, every scored token scored once (protocol megaft; docs/training.md, Validation)."
    )
