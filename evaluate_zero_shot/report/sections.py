"""Contents of the report, as plain values for its template."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from evaluate_zero_shot.evaluation.limits import remarks
from evaluate_zero_shot.formats import MISSING, TITLES, format_count, format_metric, parse_number
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol, statements
from evaluate_zero_shot.report import plots
from evaluate_zero_shot.report.comparison import Comparison, compare, published_task
from evaluate_zero_shot.report.deviations import deviations, is_user_text
from evaluate_zero_shot.report.plots import Plot
from evaluate_zero_shot.report.published import QUANTITIES, PublishedResult
from evaluate_zero_shot.tasks import TASKS

Result = Mapping[str, Any]
"""Entry of results.json with every field; `name` is the model's name in the report."""
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Pairing:
    """Measured results of one setting beside those of one source; the reasons apply to all models in it."""

    setting: str
    title: str
    """Short title of the source."""
    source: str
    metric: str
    reasons: tuple[str, ...]
    comparisons: Sequence[Comparison]


@dataclass(frozen=True, slots=True)
class Table:
    """One metric of a task: a row for each model, a column for each setting and source."""

    metric: str
    settings: Sequence[str]
    sources: Sequence[str]
    rows: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Task:
    """Measured and published results of a task."""

    title: str
    tables: Sequence[Table]
    pairings: Sequence[Pairing]
    unmeasured: Sequence[PublishedResult]
    """Published results of models that were not measured."""
    has_published: bool
    """False for a text of the user's own, of which nothing can have been published."""


@dataclass(frozen=True, slots=True)
class Illustration:
    """Plot with its heading, title and note."""

    heading: str
    title: str
    note: str
    plot: Plot | None


def window(result: Result) -> str:
    """Return context length/stride; a dash if the task has no windows."""
    has_windows = TASKS[result["task"]].kind == "text"
    return f"{format_count(result['context_length'])}/{format_count(result['stride'])}" if has_windows else MISSING


def setting_name(result: Result) -> str:
    """Return the label of a result's setting: protocol, window if any, and dtype if not float32."""
    precision = result["dtype"] if result["dtype"] not in (None, "float32") else MISSING
    return ", ".join(part for part in (result["protocol"], window(result), precision) if part != MISSING)


def ranks(result: Result) -> str:
    """Return the number of ranks, and the tensor-parallel size if above 1."""
    size = result["tensor_parallel_size"] or 1
    return format_count(result["world_size"]) + (f", tensor-parallel size {size}" if size > 1 else "")


def summary(results: Sequence[Result]) -> dict[tuple[str, str, str, tuple[str, ...]], list[Result]]:
    """Return the results by task, setting, data file and warnings."""
    return group_by(results, lambda result: (task_title(result), setting_name(result), _data(result), warnings(result)))


def warnings(result: Result) -> tuple[str, ...]:
    """Return the deviations of a result from its protocol and task, and remarks on its metric."""
    return (*deviations(result), *remarks(result, PROTOCOLS[result["protocol"]]))


def provenance(results: Sequence[Result], *fields: str) -> list[tuple[Any, ...]]:
    """Return the distinct combinations of values of some fields."""
    return list(dict.fromkeys(tuple(result[field] for field in fields) for result in results))


def _data(result: Result) -> str:
    return str(result["data_name"] or result["data_file"] or MISSING)


def protocol_statements(protocol: Protocol, results: Iterable[Result]) -> dict[str, str]:
    """Return a protocol's rules as label and phrase; those about files only if a published text was scored.

    Args:
        protocol: The protocol.
        results: All results of the report.
    """
    of_protocol = [result for result in results if result["protocol"] == protocol.name]
    own = {"Text": "a text of your own, unchanged", "Detokenizer": "none"}
    return statements(protocol) | (own if all(map(is_user_text, of_protocol)) else {})


def tasks(
    results: Sequence[Result], protocols: Mapping[str, Protocol], published_results: Iterable[PublishedResult]
) -> list[Task]:
    """Return each task's results beside the published ones, in order of measurement."""
    published_by_task = group_by(published_results, lambda published: published.task)
    by_task = group_by(results, lambda result: (result["task"], task_title(result)))
    return [
        _task(group, protocols, published_by_task.get(published_task(task), [])) for (task, _), group in by_task.items()
    ]


def _task(
    results: Sequence[Result], protocols: Mapping[str, Protocol], published_results: Sequence[PublishedResult]
) -> Task:
    comparisons = [
        compare(result, protocols[result["protocol"]], published)
        for result in results
        for published in published_results
        if published.model.is_model(result["model_name"], result["num_parameters"])
    ]
    comparable = [pair for pair in comparisons if pair.measured is not None]
    pairs = group_by(
        comparable,
        lambda pair: (
            setting_name(pair.result),
            pair.published.title,
            pair.published.source,
            pair.published.metric,
            pair.reasons,
        ),
    )
    measured = {id(pair.published) for pair in comparisons}
    return Task(
        task_title(results[0]),
        _tables(results, [pair.published for pair in comparable]),
        [Pairing(*key, group) for key, group in pairs.items()],
        [published for published in published_results if id(published) not in measured],
        not is_user_text(results[0]),
    )


def _tables(results: Sequence[Result], published_results: Sequence[PublishedResult]) -> list[Table]:
    """Return a table that compares the models for each main metric of the task; none for a single model."""
    metrics = dict.fromkeys(result["headline"] for result in results if result["headline"])
    has_several = len({result["name"] for result in results}) > 1
    return [_table(metric, results, published_results) for metric in metrics if has_several]


def _table(metric: str, results: Sequence[Result], published_results: Sequence[PublishedResult]) -> Table:
    cells = {
        (result["name"], setting_name(result)): format_metric(result[metric], metric)
        for result in results
        if result[metric] is not None
    }
    settings = dict.fromkeys(setting for _, setting in cells)
    of_metric = [published for published in published_results if QUANTITIES[published.metric] == metric]
    sources = dict.fromkeys(published.title for published in of_metric)
    for result in results:
        theirs = [
            published
            for published in of_metric
            if published.model.is_model(result["model_name"], result["num_parameters"])
        ]
        cells |= {(result["name"], published.title): published.printed for published in theirs}
    names = dict.fromkeys(result["name"] for result in results)
    rows = {name: [cells.get((name, column), MISSING) for column in (*settings, *sources)] for name in names}
    return Table(metric, list(settings), list(sources), rows)


def illustrations(results: Sequence[Result]) -> list[Illustration]:
    """Return the plots: stride sweeps if there are several strides, then by position, then by segment."""
    sweeps = group_by(
        results, lambda result: (task_title(result), result["protocol"], result["context_length"], result["headline"])
    )
    by_setting = group_by(results, lambda result: (task_title(result), setting_name(result)))
    candidates = [
        *map(_sweep, sweeps.values()),
        *map(_by_position, by_setting.values()),
        *map(_by_segment, by_setting.values()),
    ]
    return [candidate for candidate in candidates if candidate.plot is not None]


def _sweep(results: Sequence[Result]) -> Illustration:
    metric = results[0]["headline"]
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        if metric and window(result) != MISSING and (value := parse_number(result[metric])) is not None:
            lines.setdefault(result["name"], {})[result["stride"]] = value
    title = f"{task_title(results[0])}, {results[0]['protocol']}, context {results[0]['context_length']}"
    note = "Main metric by stride. A smaller stride gives each token more context, and is another protocol."
    return Illustration("Stride sweep", title, note, plots.by_stride(lines, TITLES.get(metric, str(metric))))


def _by_position(results: Sequence[Result]) -> Illustration:
    bins = {
        result["name"]: result["positions"] for result in results if result["positions"] and window(result) != MISSING
    }
    note = (
        "Mean nats per scored token by its position in the window. Positions that few windows score average few tokens."
    )
    plot = plots.by_position(bins, results[0]["context_length"] or 0)
    return Illustration("By position in the window", _setting_title(results[0]), note, plot)


def _by_segment(results: Sequence[Result]) -> Illustration:
    segments = {result["name"]: result["segments"] for result in results if result["segments"]}
    unit = str(results[0]["segment_unit"] or "segment")
    note = "Mean nats per scored token of each document, or of equal blocks of a single document, in text order."
    label = f"several {unit} together, in text order" if unit.endswith("s") else f"{unit}, in text order"
    return Illustration("Along the text", _setting_title(results[0]), note, plots.by_segment(segments, label))


def task_title(result: Result) -> str:
    """Return the title of a result's task; for a text of the user's own, the name of its file."""
    return str(result["data_file"] if is_user_text(result) else result["task_title"] or result["task"])


def _setting_title(result: Result) -> str:
    return f"{task_title(result)}, {setting_name(result)}"


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the items by key, both in order of appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
