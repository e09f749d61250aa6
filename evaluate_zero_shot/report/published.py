"""Published results, from published.json: value as printed, protocol and source."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluate_zero_shot.protocols import PROTOCOLS, statements
from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts.known_files import KNOWN
from megaft.base.errors import DataError
from megaft.base.files import parse_json

FILE = Path(__file__).with_name("published.json")
QUANTITIES = {
    "word_perplexity": "word_perplexity",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "bits_per_character": "bits_per_byte",  # published for text8 alone, in which every character is one byte
    "accuracy": "accuracy",
}
"""Metric of a published result -> field of results.json with the same quantity."""
PERCENT = " %"
_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?( %)?")


@dataclass(frozen=True, slots=True)
class Model:
    """Published model: its authors' name for it, and other names."""

    title: str
    aliases: tuple[str, ...]
    num_parameters: int | None

    def is_model(self, name: str, num_parameters: int | None) -> bool:
        """Return True if `name` or the last part of its path is an alias, and the parameter counts, if known, agree."""
        is_same_size = None in (num_parameters, self.num_parameters) or num_parameters == self.num_parameters
        return is_same_size and not {name, name.rstrip("/").rsplit("/", 1)[-1]}.isdisjoint(self.aliases)


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedResult:
    """One published number, with what is known of its measurement."""

    model: Model
    task: str
    metric: str
    printed: str
    """Number as printed: its digits show its precision. A percentage ends in " %"."""
    protocol: str | None
    """Protocol of the measurement; None if it is none of those defined here."""
    context_length: int | None
    stride: int | None
    """Stride; like `context_length`, None if it is the protocol's own."""
    data_name: str | None
    """Name of the published file that protocol and task use; None if it is unknown."""
    unpublished: tuple[str, ...]
    """Labels of the settings that the source does not state."""
    caveat: str
    """Further differences from the protocol."""
    title: str
    """Short title of the source."""
    source: str

    @property
    def value(self) -> float:
        """Printed number; a percentage stays a percentage."""
        return float(self.printed.removesuffix(PERCENT))

    def in_its_unit(self, measured: float) -> float:
        """Convert a measured value to the unit of this one (measured accuracies are fractions)."""
        return measured * 100 if self.printed.endswith(PERCENT) else measured

    def in_its_digits(self, measured: float) -> str:
        """Return a measured value in this one's unit and digits."""
        decimals = len(self.printed.removesuffix(PERCENT).partition(".")[2])
        unit = PERCENT if self.printed.endswith(PERCENT) else ""
        return f"{self.in_its_unit(measured):,.{decimals}f}{unit}"

    def agrees(self, measured: float) -> bool:
        """Return True if a measured value, rounded to the printed digits, equals this one."""
        return self.in_its_digits(measured) == self.printed


def load(path: Path = FILE) -> tuple[PublishedResult, ...]:
    """Return every published result.

    Raises:
        DataError: The file is not JSON, or one of its entries breaks a rule; the message names the entry.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        models = {name: _model(fields) for name, fields in content["models"].items()}
        return tuple(
            _published_result(path, models, content["files"], source, row)
            for source in content["sources"]
            for row in source.pop("figures")
        )
    except (OSError, json.JSONDecodeError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a list of published results: {error!r}. Install megaft again.") from error


def _model(fields: dict[str, Any]) -> Model:
    return Model(fields["title"], tuple(fields["aliases"]), fields["num_parameters"])


def _published_result(
    path: Path,
    models: Mapping[str, Model],
    files: Mapping[str, Mapping[str, str]],
    source: Mapping[str, Any],
    row: Sequence[str],
) -> PublishedResult:
    name, task, metric, printed = row
    protocol = PROTOCOLS.get(source["protocol"])
    text = "tokens" if protocol is None else protocol.file_text
    fields: dict[str, Any] = {**source, "unpublished": tuple(source["unpublished"])}
    data_name = files.get(task, {}).get(text)
    published = PublishedResult(
        model=models[name], task=task, metric=metric, printed=printed, data_name=data_name, **fields
    )
    if broken := list(_broken_rules(published)):
        raise DataError(f"{path}: {published.title}, {name}, {task}: {'; '.join(broken)}.")
    return published


def _broken_rules(published: PublishedResult) -> Iterator[str]:
    protocol = PROTOCOLS.get(published.protocol or "")
    if published.task not in TASKS:
        yield f"task {published.task!r} is not one of {', '.join(TASKS)}"
    if published.metric not in QUANTITIES:
        yield f"metric {published.metric!r} is not one of {', '.join(QUANTITIES)}"
    if not _NUMBER.fullmatch(published.printed):
        yield f"{published.printed!r} is not a number with its digits, such as 37.50 or 45.99 %"
    if published.protocol is None and not published.caveat:
        yield "protocol is null and caveat does not say why"
    if published.protocol is not None and protocol is None:
        yield f"protocol {published.protocol!r} is not one of {', '.join(PROTOCOLS)}"
    if protocol is not None and protocol.context_length is None and published.context_length is None:
        yield "context_length is null, and the protocol leaves it to the model"
    if protocol is not None and (unknown := set(published.unpublished) - set(statements(protocol))):
        yield f"unpublished has {', '.join(unknown)}, not among {', '.join(statements(protocol))}"
    if published.data_name not in {None, *(file.name for file in KNOWN.values())}:
        yield f"the file {published.data_name!r} is not a known one"
