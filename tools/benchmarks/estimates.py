"""Compare `megaft estimate` with measurements, and write docs/estimates.md and docs/scaling.md.

    python tools/benchmarks/estimates.py [--only scaling]

Three measurements: torch's memory tracker over fake tensors (activations, any model size), every byte of a real
DeepSpeed engine on CPU tensors (ZeRO's states, and the peak of a step), and the resident memory of real ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Literal

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # huge pages would round resident memory up

import tyro
from estimates_cases import ENGINES, PASSES, RANKS, Passing
from estimates_scaling import write_scaling
from invariance import write_between_marks

from megaft.base.files import write_json_atomic
from megaft.commands.estimate.memory import MicroBatch, States, activations, phases
from megaft.weights.dimensions import num_elements
from megaft.weights.families import dimensions_of
from megaft.weights.presets import PRESETS

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
MIB = 2**20
ITEMSIZES = {"bfloat16": 2, "float32": 4}
STATES = ("weights", "master_weights", "optimizer", "gradients")
KINDS = ("pass", "engine", "ranks")


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison, in bytes."""

    kind: Literal["pass", "engine", "ranks"]
    name: str
    what: str
    measured: int
    estimated: int

    @property
    def error(self) -> float:
        """Relative error of the estimate."""
        return self.estimated / self.measured - 1 if self.measured else float(self.estimated > 0)


def passes() -> Iterator[Row]:
    """Compare one forward and backward pass on fake tensors."""
    import estimates_passes

    for case in PASSES:
        found, (weights, peak) = estimates_passes.measure(case), estimate_of_pass(case)
        yield Row("pass", case.name, "weights", found.weights, weights)
        yield Row("pass", case.name, "peak of all else", found.total - found.weights, peak - weights)


def estimate_of_pass(case: Passing) -> tuple[int, int]:
    """Return the bytes of weights, and the peak of a pass that leaves its gradients where autograd puts them."""
    work = MicroBatch(
        dims=dimensions_of(PRESETS[case.model], case.dropout),
        micro_batch_size=case.micro_batch_size,
        context_length=case.context_length,
        tensor_parallel_size=case.tensor_parallel_size or 1,
        is_megatron=case.tensor_parallel_size > 0,
        is_recomputed=case.is_recomputed,
        element_bytes=ITEMSIZES[case.dtype],
    )
    weights = num_elements(work.weights) * work.element_bytes
    held = States(
        weights=weights,
        master_weights=0,
        optimizer=0,
        gradients=weights,
        gradients_before=0,
        gradients_reduced=weights,
    )
    return weights, max(sum(parts.values()) for parts in phases(held, activations(work)).values())


def engines() -> Iterator[Row]:
    """Compare a real engine as one of several ranks; host and device memory are the same here."""
    import estimates_engine

    for case in ENGINES:
        found, footprint = estimates_engine.measure(case.recipe), case.recipe.footprint(rank=0)
        held, is_offloaded = footprint.states, footprint.states.host > 0
        for kind in STATES[: 0 if is_offloaded else 3]:
            yield Row("engine", case.name, kind, getattr(found, kind), getattr(held, kind))
        if not is_offloaded:
            whole = held.gradients_reduced if case.recipe.setup().zero_stage in (1, 2) else held.gradients
            is_kept = case.recipe.setup().dtype != "bfloat16" or case.recipe.setup().zero_stage != 1
            yield Row("engine", case.name, "gradients", found.gradients, whole if is_kept else held.gradients)
        yield Row("engine", case.name, "peak of a step", found.peak, footprint.peak_bytes + held.host)


def ranks() -> Iterator[Row]:
    """Compare real ranks between two steps."""
    import estimates_ranks

    for case, found in zip(RANKS, estimates_ranks.measure(), strict=True):
        held = case.recipe.footprint().states
        kept = held.weights + held.master_weights + held.optimizer + held.gradients_before + held.buckets_before
        yield Row("ranks", case.name, "resident", found["resident"], kept)


def table(rows: list[Row]) -> str:
    """Return the comparisons as Markdown, one line per case."""
    parts = [
        _section("Activations: one pass of fake tensors", [row for row in rows if row.kind == "pass"]),
        _section("ZeRO: every byte of a real engine", [row for row in rows if row.kind == "engine"]),
        _section("Resident memory of real ranks", [row for row in rows if row.kind == "ranks"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _section(title: str, rows: list[Row]) -> str:
    if not rows:
        return ""
    whats = list(dict.fromkeys(row.what for row in rows))
    head = [f"## {title}", "", f"| case | {' | '.join(whats)} |", "|---" * (1 + len(whats)) + "|"]
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row.name, {})[row.what] = row
    return "\n".join([*head, *(f"| {name} | {_cells(found, whats)} |" for name, found in by_case.items())])


def _cells(found: dict[str, Row], whats: list[str]) -> str:
    cells = []
    for what in whats:
        row = found.get(what)
        cells.append("-" if row is None or not row.measured else _cell(row))
    return " | ".join(cells)


def _cell(row: Row) -> str:
    return f"{row.estimated / MIB:,.1f} / {row.measured / MIB:,.1f} MiB, {row.error:+.1%}"


def summary(rows: list[Row]) -> str:
    """Return the largest error of the states, which should be within 1 %, and of the peaks."""
    states = [row for row in rows if row.what in STATES and row.measured]
    peaks = [row for row in rows if row.what.startswith("peak")]
    lines = []
    for name, group in (("figures of weights, gradients and optimizer", states), ("peaks", peaks)):
        if group:
            worst = max(group, key=lambda row: abs(row.error))
            error = f"{worst.error:+.2%}\n({worst.name}: {worst.what})"
            lines.append(f"Largest error of {len(group)} {name}: {error}.")
    return "\n\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Compare `megaft estimate` with measurements."""

    only: Literal["pass", "engine", "ranks", "scaling"] | None = None
    """Measure and replace only this part."""


def main(arguments: Arguments) -> None:
    """Measure, print, write."""
    parts = {"pass": passes, "engine": engines, "ranks": ranks}
    wanted = [kind for kind in parts if arguments.only in (None, kind)]
    rows = []
    for row in chain.from_iterable(parts[kind]() for kind in wanted):
        print(row.name, row.what, _cell(row), flush=True)
        rows.append(row)
    if rows:
        write(wanted, rows)
    if arguments.only in (None, "scaling"):
        write_scaling(ROOT / "docs" / "scaling.md")


def write(kinds: list[str], rows: list[Row]) -> None:
    """Write the results and the page, keeping earlier rows of other kinds."""
    from megaft.base.environment import environment

    where = environment()
    stem = RESULTS / f"estimates_cpu{where['num_cores']}_{datetime.now(UTC):%Y%m}"
    path = stem.with_suffix(".json")
    if path.exists():
        earlier = [Row(**row) for row in json.loads(path.read_text())["rows"]]
        rows = sorted(
            [*rows, *(row for row in earlier if row.kind not in kinds)], key=lambda row: KINDS.index(row.kind)
        )
    write_json_atomic(path, {"environment": where, "rows": [asdict(row) for row in rows]})
    content = f"{summary(rows)}\n\n{table(rows)}"
    versions = ", ".join(f"{name} {where['packages'][name]}" for name in ("torch", "deepspeed", "transformers"))
    title = f"# megaft's estimates beside measurements\n\n`python tools/benchmarks/estimates.py`; {versions}, commit"
    text = f"{title} {where['git']['commit']}.\n\nEstimated / measured. {content}\n"
    stem.with_suffix(".md").write_text(text)
    write_between_marks(ROOT / "docs" / "estimates.md", content)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
