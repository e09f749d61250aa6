"""Contents of the report by task: plain values that both templates print."""

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
from evaluate_zero_shot.trial.limits import remarks

Result = Mapping[str, Any]
"""An entry of results.json, every field present; `name` is what its model is called here."""
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Pairing:
    """One way of measuring beside one source: the reasons hold for all models in it."""

    run: str
    title: str
    """Short title of the source."""
    source: str
    metric: str
    reasons: tuple[str, ...]
    comparisons: Sequence[Comparison]


@dataclass(frozen=True, slots=True)
class Table:
    """One metric of a task: a row a model, a column a way of measuring it or a source."""

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


@dataclass(frozen=True, slots=True)
class Illustration:
    """A plot under its heading."""

    heading: str
    title: str
    note: str
    plot: Plot | None


def window(result: Result) -> str:
    """Return context/stride; a dash where the task has no windows."""
    has_windows = TASKS[result["task"]].kind == "text"
    return f"{counted(result['context_length'])}/{counted(result['stride'])}" if has_windows else MISSING


def run_name(result: Result) -> str:
    """Return a label of a result's measurement: protocol, window if any, and dtype below float32."""
    precision = result["dtype"] if result["dtype"] not in (None, "float32") else MISSING
    return ", ".join(part for part in (result["protocol"], window(result), precision) if part != MISSING)


def ranks(result: Result) -> str:
    """Return on how many ranks it was measured, and over how many each matrix was cut where that is more than one."""
    size = result["tensor_parallel_size"] or 1
    return counted(result["world_size"]) + (f", matrices cut over {size}" if size > 1 else "")


def summary(results: Sequence[Result]) -> dict[tuple[str, str, str, tuple[str, ...]], list[Result]]:
    """Return the results by task, way of measuring, data file, and what each reader must know of them."""
    return grouped(results, lambda one: (_task_title(one), run_name(one), _data(one), warnings(one)))


def warnings(result: Result) -> tuple[str, ...]:
    """Return the differences of a result from its protocol and task as defined."""
    limit = result["limit_lines"]
    return (
        *(["unknown file"] if result["data_name"] is None and TASKS[result["task"]].files else []),
        *(["not the protocol's text"] if _is_other_text(result) else []),
        *([f"first {limit:,} lines only"] if limit is not None else []),
        *([] if result["is_protocol_default"] else ["not the protocol's own context or stride"]),
        *remarks(result, PROTOCOLS[result["protocol"]]),
    )


def _is_other_text(result: Result) -> bool:
    """Return True if the raw file was scored where the protocol scores the word-tokenized one, or the reverse."""
    name = result["data_name"]
    if TASKS[result["task"]].raw_files is None or name is None:
        return False
    return (" raw " in name) != (PROTOCOLS[result["protocol"]].text != "tokens")


def provenance(results: Sequence[Result], *fields: str) -> list[tuple[Any, ...]]:
    """Return the distinct combinations of the fields in the results."""
    return list(dict.fromkeys(tuple(one[field] for field in fields) for one in results))


def _data(result: Result) -> str:
    return str(result["data_name"] or result["data_file"] or MISSING)


def tasks(results: Sequence[Result], protocols: Mapping[str, Protocol], figures: Iterable[Figure]) -> list[Task]:
    """Return each task's results beside the figures published for it, in the order they were measured."""
    published = grouped(figures, lambda figure: figure.task)
    by_task = grouped(results, lambda result: (result["task"], _task_title(result)))
    return [_task(found, protocols, published.get(published_task(task), [])) for (task, _), found in by_task.items()]


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
        _task_title(results[0]),
        _tables(results, [one.figure for one in shown]),
        [Pairing(*key, found) for key, found in pairs.items()],
        [figure for figure in figures if id(figure) not in measured],
    )


def _tables(results: Sequence[Result], figures: Sequence[Figure]) -> list[Table]:
    """Return the comparative tables of several models, one for each main figure of the task."""
    metrics = dict.fromkeys(result["headline"] for result in results if result["headline"])
    has_several = len({result["name"] for result in results}) > 1
    return [_table(metric, results, figures) for metric in metrics if has_several]


def _table(metric: str, results: Sequence[Result], figures: Sequence[Figure]) -> Table:
    cells = {(one["name"], run_name(one)): written(one[metric], metric) for one in results if one[metric] is not None}
    runs = dict.fromkeys(run for _, run in cells)
    found = [figure for figure in figures if QUANTITIES[figure.metric] == metric]
    sources = dict.fromkeys(figure.title for figure in found)
    for result in results:
        theirs = [one for one in found if one.model.is_model(result["model_name"], result["num_parameters"])]
        cells |= {(result["name"], figure.title): figure.printed for figure in theirs}
    names = dict.fromkeys(result["name"] for result in results)
    rows = {name: [cells.get((name, column), MISSING) for column in (*runs, *sources)] for name in names}
    return Table(metric, list(runs), list(sources), rows)


def illustrations(results: Sequence[Result]) -> list[Illustration]:
    """Return the plots: stride sweeps where several strides were asked for, then by position, then by segment."""
    sweeps = grouped(results, lambda one: (_task_title(one), one["protocol"], one["context_length"], one["headline"]))
    runs = grouped(results, lambda one: (_task_title(one), run_name(one)))
    made = [*map(_sweep, sweeps.values()), *map(_by_position, runs.values()), *map(_by_segment, runs.values())]
    return [one for one in made if one.plot is not None]


def _sweep(results: Sequence[Result]) -> Illustration:
    metric = results[0]["headline"]
    lines: dict[str, dict[int, float]] = {}
    for one in results:
        if metric and window(one) != MISSING and (value := number(one[metric])) is not None:
            lines.setdefault(one["name"], {})[one["stride"]] = value
    title = f"{_task_title(results[0])}, {results[0]['protocol']}, context {results[0]['context_length']}"
    note = "The main figure by stride. A smaller stride gives each token more context, and is another protocol."
    return Illustration("Stride sweep", title, note, plots.by_stride(lines, TITLES.get(metric, str(metric))))


def _by_position(results: Sequence[Result]) -> Illustration:
    bins = {one["name"]: one["positions"] for one in results if one["positions"] and window(one) != MISSING}
    note = "Mean nats per scored token by its place in the window. Where few windows score, few tokens are averaged."
    plot = plots.by_position(bins, results[0]["context_length"] or 0)
    return Illustration("By position in the window", _run_title(results[0]), note, plot)


def _by_segment(results: Sequence[Result]) -> Illustration:
    segments = {one["name"]: one["segments"] for one in results if one["segments"]}
    unit = str(results[0]["segment_unit"] or "segment")
    note = "Mean nats per scored token of documents, or of equal blocks of a single one, in the order of the text."
    label = (
        f"a few {unit} together, in the order of the text"
        if unit.endswith("s")
        else f"{unit}, in the order of the text"
    )
    return Illustration("Along the text", _run_title(results[0]), note, plots.by_segment(segments, label))


def _task_title(result: Result) -> str:
    title = str(result["task_title"] or result["task"])
    return title if TASKS[result["task"]].files else f"{title} {result['data_file']}"  # any file may be one's own text


def _run_title(result: Result) -> str:
    return f"{_task_title(result)}, {run_name(result)}"


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return the items by key, keys and items in their order."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
