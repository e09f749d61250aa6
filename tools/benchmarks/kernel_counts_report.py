"""Tables of docs/performance.md: the kernels of a micro-batch and its predicted time, before and after each change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from invariance import write_between_marks
from kernel_counts import MEMORY_BYTES, KernelCounter, count
from kernel_counts_compiled import count_compiled

from megaft.commands.estimate.roofline import ACCUMULATION_BYTES, CONVERTED_BYTES, STEP_BYTES, SUSTAINED_MEMORY
from megaft.weights.families import dimensions_of
from megaft.weights.presets import PRESETS

CONTEXT_LENGTH = 1024
BATCH_SIZE = 512
TITLES = {"gpt2-xl": "GPT-2-XL", "llama-3.2-1b": "Llama 3.2 1B"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a counted micro-batch and how its gradients are accumulated."""

    name: str
    counter: KernelCounter
    accumulation_bytes: int = ACCUMULATION_BYTES
    micro_batch_size: int = 8

    def tokens_per_second(self, num_parameters: int, *, sustained: bool) -> float:
        """Return the predicted throughput with accumulation and the optimizer step."""
        num_micro_batches = BATCH_SIZE / self.micro_batch_size
        moved = num_parameters * (self.accumulation_bytes + STEP_BYTES / num_micro_batches)
        state_seconds = moved / MEMORY_BYTES / (SUSTAINED_MEMORY if sustained else 1)
        seconds = self.counter.totals.seconds(sustained=sustained) + state_seconds
        return self.micro_batch_size * CONTEXT_LENGTH / seconds


def lines(model: str) -> Iterator[Line]:
    """Count a model's micro-batch before and after each change; each line includes those above it."""
    plain = count(model, is_fused=False, is_new_head=False)
    yield Line("transformers' operations, plain chunked loss", plain, CONVERTED_BYTES)
    yield Line("fused activations and norms", count(model, is_new_head=False), CONVERTED_BYTES)
    fused = count(model)
    yield Line("new output layer", fused, CONVERTED_BYTES)
    yield Line("gradients added in one operation", fused)
    yield Line("blocks compiled", count_compiled(model))
    yield Line("micro-batch 16", count_compiled(model, 16), micro_batch_size=16)
    yield Line("(micro-batch 16, blocks not compiled)", count(model, 16), micro_batch_size=16)


def table(model: str) -> str:
    """Return the table of a model's lines, and those of the categories, without and with compiled blocks."""
    num_parameters = dimensions_of(PRESETS[model]).num_parameters
    measured = list(lines(model))
    head = "| change | kernels | GB moved | GiB saved | ms | tokens/s, burst | tokens/s, sustained |"
    rows = [_row(line, num_parameters) for line in measured]
    eager = _categories("Kernels of a micro-batch of 8, blocks not compiled:", measured[2].counter)
    compiled = _categories("The same with compiled blocks:", measured[4].counter)
    return "\n".join([f"## {TITLES[model]}", "", head, "|---" * 7 + "|", *rows, "", *eager, "", *compiled])


def _row(line: Line, num_parameters: int) -> str:
    totals = line.counter.totals
    rates = [line.tokens_per_second(num_parameters, sustained=sustained) for sustained in (False, True)]
    return (
        f"| {line.name} | {totals.kernels:,} | {totals.bytes / 1e9:.1f} | {line.counter.saved_bytes / 2**30:.2f} | "
        f"{totals.seconds() * 1e3:.1f} | {rates[0]:,.0f} | {rates[1]:,.0f} |"
    )


def _categories(title: str, counter: KernelCounter) -> list[str]:
    by_time = sorted(counter.categories.items(), key=lambda item: -item[1].seconds())
    rows = [
        f"| {name} | {each.kernels:,} | {each.bytes / 1e9:.1f} | {each.flops / 1e12:.2f} | {each.seconds() * 1e3:.1f} |"
        for name, each in by_time
    ]
    return [title, "", "| kind | kernels | GB moved | TFLOP | ms |", "|---" * 5 + "|", *rows]


def write_report(page: Path) -> None:
    """Write the tables into the page."""
    content = "\n\n".join(map(table, TITLES))
    print(content)
    write_between_marks(page, content)
