"""Contents of the report, as plain values for its template."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from evaluate_zero_shot.formats import MISSING, TITLES, counted, number, written
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol
from evaluate_zero_shot.report import plots
from evaluate_zero_shot.report.comparison import Comparison, compare, published_task
from evaluate_zero_shot.report.plots import Plot
from evaluate_zero_shot.report.published import QUANTITIES, Figure
from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.texts.known_files import TEXTS
from evaluate_zero_shot.trial.limits import remarks

Result = Mapping[str, Any]
"""Entry of results.json with every field; `name` is the model's name in the report."""
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Pairing:
    """One setting beside one source; the reasons apply to all its models."""

    run: str
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
    runs: Sequence[str]
    sources: Sequence[str]
    rows: Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Task:
    """Measured and published figures of a task."""

    title: str
    tables: Sequence[Table]
    pairings: Sequence[Pairing]
    others: Sequence[Figure]
    """Published figures of models that were not measured."""
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
    return f"{counted(result['context_length'])}/{counted(result['stride'])}" if has_windows else MISSING


def run_name(result: Result) -> str:
    """Return the label of a result's setting: protocol, window if any, and dtype if not float32."""
    precision = result["dtype"] if result["dtype"] not in (None, "float32") else MISSING
    return ", ".join(part for part in (result["protocol"], window(result), precision) if part != MISSING)


def ranks(result: Result) -> str:
    """Return the number of ranks, and the tensor-parallel size if above 1."""
    size = result["tensor_parallel_size"] or 1
    return counted(result["world_size"]) + (f", tensor-parallel size {size}" if size > 1 else "")


def summary(results: Sequence[Result]) -> dict[tuple[str, str, str, tuple[str, ...]], list[Result]]:
    """Return the results by task, setting, data file and warnings."""
    return grouped(results, lambda one: (task_title(one), run_name(one), _data(one), warnings(one)))


def warnings(result: Result) -> tuple[str, ...]:
    """Return how a result deviates from its protocol and task as defined."""
    limit = result["limit_lines"]
    return (
        *(["unknown file"] if result["data_name"] is None and not is_own_text(result) else []),
        *(["not the protocol's text"] if _is_other_text(result) else []),
        *([f"first {limit:,} lines only"] if limit is not None else []),
        *([] if result["is_protocol_default"] else ["not the protocol's own context or stride"]),
        *remarks(result, PROTOCOLS[result["protocol"]]),
    )


def _is_other_text(result: Result) -> bool:
    """Return True if the raw file was scored but the protocol asks for the word-tokenized one, or the reverse."""
    if TASKS[result["task"]].raw_files is None or result["data_name"] not in TEXTS:
        return False
    return TEXTS[result["data_name"]] != PROTOCOLS[result["protocol"]].file_text


def provenance(results: Sequence[Result], *fields: str) -> list[tuple[Any, ...]]:
    """Return the distinct combinations of values of some fields."""
    return list(dict.fromkeys(tuple(one[field] for field in fields) for one in results))


def _data(result: Result) -> str:
    return str(result["data_name"] or result["data_file"] or MISSING)


def tasks(results: Sequence[Result], protocols: Mapping[str, Protocol], figures: Iterable[Figure]) -> list[Task]:
    """Return each task's results beside its published figures, in order of measurement."""
    published = grouped(figures, lambda figure: figure.task)
    by_task = grouped(results, lambda result: (result["task"], task_title(result)))
    return [_task(group, protocols, published.get(published_task(task), [])) for (task, _), group in by_task.items()]


def _task(results: Sequence[Result], protocols: Mapping[str, Protocol], figures: Sequence[Figure]) -> Task:
    comparisons = [
        compare(result, protocols[result["protocol"]], figure)
        for result in results
        for figure in figures
        if figure.model.is_model(result["model_name"], result["num_parameters"])
    ]
    shown = [one for one in comparisons if one.measured is not None]
    pairs = grouped(
        shown, lambda one: (run_name(one.result), one.figure.title, one.figure.source, one.figure.metric, one.reasons)
    )
    measured = {id(one.figure) for one in comparisons}
    return Task(
        task_title(results[0]),
        _tables(results, [one.figure for one in shown]),
        [Pairing(*key, group) for key, group in pairs.items()],
        [figure for figure in figures if id(figure) not in measured],
        not is_own_text(results[0]),
    )


def _tables(results: Sequence[Result], figures: Sequence[Figure]) -> list[Table]:
    """Return a table that compares the models for each main metric of the task; none for a single model."""
    metrics = dict.fromkeys(result["headline"] for result in results if result["headline"])
    has_several = len({result["name"] for result in results}) > 1
    return [_table(metric, results, figures) for metric in metrics if has_several]


def _table(metric: str, results: Sequence[Result], figures: Sequence[Figure]) -> Table:
    cells = {(one["name"], run_name(one)): written(one[metric], metric) for one in results if one[metric] is not None}
    runs = dict.fromkeys(run for _, run in cells)
    published = [figure for figure in figures if QUANTITIES[figure.metric] == metric]
    sources = dict.fromkeys(figure.title for figure in published)
    for result in results:
        theirs = [one for one in published if one.model.is_model(result["model_name"], result["num_parameters"])]
        cells |= {(result["name"], figure.title): figure.printed for figure in theirs}
    names = dict.fromkeys(result["name"] for result in results)
    rows = {name: [cells.get((name, column), MISSING) for column in (*runs, *sources)] for name in names}
    return Table(metric, list(runs), list(sources), rows)


def illustrations(results: Sequence[Result]) -> list[Illustration]:
    """Return the plots: stride sweeps if there are several strides, then by position, then by segment."""
    sweeps = grouped(results, lambda one: (task_title(one), one["protocol"], one["context_length"], one["headline"]))
    runs = grouped(results, lambda one: (task_title(one), run_name(one)))
    made = [*map(_sweep, sweeps.values()), *map(_by_position, runs.values()), *map(_by_segment, runs.values())]
    return [one for one in made if one.plot is not None]


def _sweep(results: Sequence[Result]) -> Illustration:
    metric = results[0]["headline"]
    lines: dict[str, dict[int, float]] = {}
    for one in results:
        if metric and window(one) != MISSING and (value := number(one[metric])) is not None:
            lines.setdefault(one["name"], {})[one["stride"]] = value
    title = f"{task_title(results[0])}, {results[0]['protocol']}, context {results[0]['context_length']}"
    note = "Main figure by stride. A smaller stride gives each token more context, and is another protocol."
    return Illustration("Stride sweep", title, note, plots.by_stride(lines, TITLES.get(metric, str(metric))))


def _by_position(results: Sequence[Result]) -> Illustration:
    bins = {one["name"]: one["positions"] for one in results if one["positions"] and window(one) != MISSING}
    note = (
        "Mean nats per scored token by its position in the window. Positions that few windows score average few tokens."
    )
    plot = plots.by_position(bins, results[0]["context_length"] or 0)
    return Illustration("By position in the window", _run_title(results[0]), note, plot)


def _by_segment(results: Sequence[Result]) -> Illustration:
    segments = {one["name"]: one["segments"] for one in results if one["segments"]}
    unit = str(results[0]["segment_unit"] or "segment")
    note = "Mean nats per scored token of each document, or of equal blocks of a single document, in text order."
    label = f"several {unit} together, in text order" if unit.endswith("s") else f"{unit}, in text order"
    return Illustration("Along the text", _run_title(results[0]), note, plots.by_segment(segments, label))


def is_own_text(result: Result) -> bool:
    """Return True if the task scores any file, which the user names."""
    return TASKS[result["task"]].files is None


def task_title(result: Result) -> str:
    """Return the title of a result's task; for a text of the user's own, the name of its file."""
    return str(result["data_file"] if is_own_text(result) else result["task_title"] or result["task"])


def _run_title(result: Result) -> str:
    return f"{task_title(result)}, {run_name(result)}"


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the items by key, both in order of appearance."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
