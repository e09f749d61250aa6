"""Plots as paths and ticks, which a template draws as SVG without a script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from evaluate_zero_shot.formats import parse_number

SIZE = 1000
"""Paths use SIZE by SIZE units, which the page stretches; text is not stretched."""
MAX_DOTS = 16
Point = tuple[float, float]
Lines = Mapping[str, Sequence[Point]]
"""Points by name. A line is interrupted at points that are not finite."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Plot for the template."""

    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    """Percent of the width; text."""
    y_ticks: list[tuple[float, str]]
    """Percent of the height, from the top; text."""
    lines: list[tuple[str, str, str]]
    """Name, path of the line, and path of its dots (empty if there are many)."""


def by_position(bins: Mapping[str, Sequence[Sequence[float]]], context_length: int) -> Plot | None:
    """Plot nats per token by position in the window, from bins of [first position, scored tokens, nats]."""
    lines = {}
    for name, rows in bins.items():
        ends = [*(row[0] for row in rows[1:]), context_length]
        middles = [math.sqrt((row[0] + 1) * max(end, row[0] + 1)) for row, end in zip(rows, ends, strict=True)]
        lines[name] = [(x, _mean(row[1], row[2])) for x, row in zip(middles, rows, strict=True)]
    marks = [4**power for power in range(12)]
    return draw(lines, "position in the window, tokens (logarithmic)", "nats per token", marks, is_log=True)


def by_segment(segments: Mapping[str, Sequence[Sequence[float]]], x_label: str) -> Plot | None:
    """Plot nats per token along the text, from [scored tokens, nats] of each segment."""
    lines = {name: [(i, _mean(*row)) for i, row in enumerate(rows, 1)] for name, rows in segments.items()}
    return draw(lines, x_label, "nats per token")


def by_stride(values: Mapping[str, Mapping[int, float]], title: str) -> Plot | None:
    """Plot a metric by stride, from values by name and stride."""
    strides = sorted({stride for by_stride in values.values() for stride in by_stride})
    lines = {name: sorted(by_stride.items()) for name, by_stride in values.items()}
    return draw(lines, "stride, tokens (logarithmic)", title, strides, is_log=True)


def draw(
    lines: Lines, x_label: str, y_label: str, x_marks: Sequence[float] = (), *, is_log: bool = False
) -> Plot | None:
    """Plot lines; None if no line has two finite points.

    Args:
        lines: Points by name.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
        x_marks: Ticks of the horizontal axis; round numbers by default.
        is_log: True for a logarithmic horizontal axis, on which every x must be positive.
    """
    finite = [[point for point in points if math.isfinite(point[1])] for points in lines.values()]
    if max(map(len, finite), default=0) < 2:
        return None
    scale = math.log if is_log else float
    y_marks = _round_numbers(*_range(y for points in finite for _, y in points))
    left, right = _range(scale(x) for points in finite for x, _ in points)
    low, high = y_marks[0], y_marks[-1]

    def scaled(x: float, y: float) -> Point:
        return (scale(x) - left) / (right - left), (high - y) / (high - low)

    shown = [x for x in x_marks or _round_numbers(left, right) if left <= scale(x) <= right]
    has_dots = max(map(len, finite)) <= MAX_DOTS
    scaled_lines = {name: [scaled(*point) for point in points] for name, points in lines.items()}
    return Plot(
        x_label,
        y_label,
        [(round(scaled(x, low)[0] * 100, 2), f"{x:,.6g}") for x in shown],
        [(round((high - y) / (high - low) * 100, 2), f"{y:,.6g}") for y in y_marks],
        [(name, _line(points), _dots(points) if has_dots else "") for name, points in scaled_lines.items()],
    )


def _mean(tokens: float, nats: object) -> float:
    total = parse_number(nats)
    return total / tokens if total is not None and tokens else math.nan


def _range(values: Iterable[float]) -> Point:
    """Return the smallest and largest value, widened if they are equal."""
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _round_numbers(low: float, high: float) -> list[float]:
    """Return about five round numbers (multiples of 1, 2 or 5 times a power of ten) that enclose the range."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least * (1 - 1e-9))
    return [round(k * step, 12) for k in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _line(points: Iterable[Point]) -> str:
    with_gaps = [(math.nan, math.nan), *points]
    return "".join(
        f"{'L' if math.isfinite(before[1]) else 'M'}{_units(point)}"
        for before, point in pairwise(with_gaps)
        if math.isfinite(point[1])
    )


def _dots(points: Iterable[Point]) -> str:
    return "".join(f"M{_units(point)}h0" for point in points if math.isfinite(point[1]))


def _units(point: Point) -> str:
    return f"{point[0] * SIZE:.1f} {point[1] * SIZE:.1f}"
