"""Comparison of a measured result with a published one, or the reasons why the two are not comparable."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evaluate_zero_shot.formats import MISSING, format_metric, parse_number
from evaluate_zero_shot.protocols import PROTOCOLS, Difference, Protocol, differences
from evaluate_zero_shot.report.published import QUANTITIES, PublishedResult
from evaluate_zero_shot.tasks import TASKS

_PROMPT_FIELDS = {
    "last-word": {"detokenizer", "has_prompt_prefix", "last_word"},
    "cloze": {"detokenizer", "has_prompt_prefix", "has_cloze"},
}
"""Fields of a protocol that affect the metrics of prompts, by kind of task."""
_NOT_OF_TEXT = {"has_prompt_prefix", "last_word", "has_cloze", "context_length", "stride"}
"""Fields not compared for texts: those of prompts, and those whose actual values are compared instead."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Measured result beside a published one."""

    result: Mapping[str, Any]
    published: PublishedResult
    measured: float | None
    reasons: tuple[str, ...]
    """Reasons why they are not the same quantity; empty if they are."""
    is_same_protocol: bool

    @property
    def is_reproduced(self) -> bool:
        """True if this is the same quantity and equals the published digits."""
        return not self.reasons and self.measured is not None and self.published.agrees(self.measured)

    @property
    def verdict(self) -> str:
        """One-line verdict. Only the same quantity can agree."""
        if not self.is_same_protocol:
            return "another protocol"
        if self.reasons:
            return "same protocol, not the same measurement"
        if self.measured is None or not math.isfinite(self.measured):
            return "same protocol: the measured value is not finite"
        if self.is_reproduced:
            return "same protocol: agrees to the printed digits"
        return f"same protocol: differs by {self.difference_text.lstrip('+-')}"

    @property
    def measured_text(self) -> str:
        """Measured value, with as many digits as the published one."""
        if self.measured is None or not math.isfinite(self.measured):
            return format_metric(self.measured, self.published.metric)
        return self.published.in_its_digits(self.measured)

    @property
    def difference_text(self) -> str:
        """Signed difference in percent of the published value."""
        if self.measured is None or not math.isfinite(self.measured):
            return MISSING
        return f"{(self.published.in_its_unit(self.measured) / self.published.value - 1) * 100:+.2f} %"


def compare(result: Mapping[str, Any], ours: Protocol, published: PublishedResult) -> Comparison:
    """Compare an entry of results.json, measured by the protocol `ours`, with a published result of the same task."""
    task = TASKS[result["task"]]
    if task.last_word is not None:
        ours = replace(ours, last_word=task.last_word)
    protocol_reasons = tuple(_protocol_reasons(result, ours, published))
    measured = parse_number(result[QUANTITIES[published.metric]])
    reasons = (*protocol_reasons, *_other_reasons(result, published))
    return Comparison(result, published, measured, reasons, not protocol_reasons)


def published_task(task: str) -> str:
    """Return the task whose published results apply; all variants of LAMBADA share them."""
    return "lambada" if TASKS[task].kind == "last-word" else task


def _protocol_reasons(result: Mapping[str, Any], ours: Protocol, published: PublishedResult) -> Iterator[str]:
    if published.caveat:
        yield published.caveat
    if published.protocol is None:
        return
    theirs, kind = PROTOCOLS[published.protocol], TASKS[published.task].kind
    if ours.name != theirs.name:
        yield f"Protocol: {ours.name}; published: {theirs.name}"
    for difference in differences(ours, theirs):
        if _is_relevant(difference, kind, published):
            yield str(difference)
    if kind == "text":
        yield from _window_reasons(result, published, theirs)
    elif not result["is_protocol_default"]:
        yield f"Context length: {result['context_length']}, too short for some prompts"


def _is_relevant(difference: Difference, kind: str, published: PublishedResult) -> bool:
    if kind in _PROMPT_FIELDS:
        return difference.field in _PROMPT_FIELDS[kind]
    return difference.field not in _NOT_OF_TEXT and difference.label not in published.unpublished


def _window_reasons(result: Mapping[str, Any], published: PublishedResult, theirs: Protocol) -> Iterator[str]:
    if published.unpublished:
        yield f"Not published: {', '.join(published.unpublished)}"
    context_length = published.context_length or theirs.context_length or 0
    shares = {"context": context_length, "half": context_length // 2}
    stride = published.stride or shares.get(str(theirs.stride), theirs.stride)
    for label, ours, other in (
        ("Context length", result["context_length"], context_length),
        ("Stride", result["stride"], stride),
    ):
        if ours != other and label not in published.unpublished:
            yield f"{label}: {ours}; published: {other}"


def _other_reasons(result: Mapping[str, Any], published: PublishedResult) -> Iterator[str]:
    if not published.model.is_model(result["model_name"], result["num_parameters"]):
        yield f"Model: {result['model_name']}; published: {published.model.title}"
    if published_task(result["task"]) != published.task:
        yield f"Task: {result['task']}; published: {published.task}"
    if result["data_name"] is None or result["data_name"] != published.data_name:
        unknown = "an unknown file"
        yield f"Data: {result['data_name'] or unknown}; published: {published.data_name or unknown}"
    if result["limit_lines"] is not None:
        yield f"Data: only the first {result['limit_lines']:,} lines; published: the whole file"
