"""Report of the evaluation benchmark: predicted FLOPs, measurements, and the causes of the difference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from evaluate_vs_peers_case import Case, Contestant
from train_report import cpu_name, spread, table

AGREEMENT = 1e-5
"""Largest relative difference of nats in float32. Half precision rounds each logit, and kernels differ in order."""
HALF_PRECISION_AGREEMENT = 5e-3

WAYS = {
    "megaft": "`python -m evaluate_zero_shot` without its report",
    "megatron": "Megatron-LM's zeroshot_gpt loop over transformers' model: batch 8, all logits, float32 loss",
    "padded": "Megatron-LM's LAMBADA: every row padded to the context, batch 8, all logits",
    "lm-eval": "lm-evaluation-harness's HFLM, with its batch size",
}

WHY = {
    "stride": "Kernels: float32 products packed for oneDNN do more FLOPs a second than MKL's on processors where MKL "
    "has no AVX-512. The peer also writes and reads all logits, which FLOPs do not count.",
    "pages": "Every token of a page is scored but where a window is extended left, so that FLOPs alone save next to "
    "nothing; the rest is packed products, and logits that stay in chunks, where the peer makes them whole and takes "
    "log_softmax and argmax of them all.",
    "padded": "Rows of a length together instead of padding; packed products, whose gain outweighs that short rows "
    "make small ones; and no logits that nobody asked for.",
    "lambada": "Packed products, rows of a length together, and no log_softmax or argmax of logits nobody asked for.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A case, the FLOPs of each system, and its runs in order."""

    case: Case
    flops: dict[Contestant, int]
    num_windows: int
    num_scored_tokens: int
    runs: dict[Contestant, list[dict[str, Any]]]

    @property
    def best_peer(self) -> Contestant:
        """Fastest other system by median."""
        return min(self.case.peers, key=lambda peer: median(self.seconds(peer)))

    def seconds(self, contestant: Contestant) -> list[float]:
        """Of its runs."""
        return [run["seconds"] for run in self.runs[contestant]]

    def ratios(self, peer: Contestant) -> list[float]:
        """Return the speedup of megaft, repeat by repeat."""
        return [a / b for a, b in zip(self.seconds(peer), self.seconds("megaft"), strict=True)]

    def predicted(self, peer: Contestant) -> float:
        """The ratio of FLOPs."""
        return self.flops[peer] / self.flops["megaft"]

    def disagreement(self) -> float:
        """Largest relative difference of nats between any two runs."""
        nats = [run["nats"] for runs in self.runs.values() for run in runs]
        return max(nats) / min(nats) - 1

    @property
    def is_sound(self) -> bool:
        """Return whether all systems agree on nats and accuracy."""
        limit = AGREEMENT if self.case.dtype == "float32" else HALF_PRECISION_AGREEMENT
        accuracies = {run["accuracy"] for runs in self.runs.values() for run in runs}
        return self.disagreement() <= limit and (len(accuracies) == 1 or self.case.dtype != "float32")

    def markdown(self) -> str:
        """Return a section."""
        case = self.case
        what = f"{case.model}, {case.task}, protocol {case.protocol}"
        what += f", context {case.context_length}" * bool(case.context_length) + f", stride {case.stride}" * bool(
            case.stride
        )
        lines = [f"## {case.name}: {what}, {case.dtype} on {case.device}"]
        lines.append(f"{self.num_windows:,} windows or rows, {self.num_scored_tokens:,} scored tokens.")
        header = ("contestant", "s", "TFLOP", "GFLOP/s", "peak memory", "nats")
        lines.append(table(header, map(self._row, case.contestants)))
        header = ("megaft is faster than", "predicted from FLOPs", "measured", "measured / predicted")
        lines.append(table(header, map(self._ratio_row, case.peers)))
        verdict = "agree" if self.is_sound else "DISAGREE"
        best = median(self.ratios(self.best_peer))
        goal = f"; {best:.2f} times the best peer, {case.goal:g} wanted" if case.goal else ""
        lines.append(f"Nats {verdict} within {self.disagreement():.1e}{goal}. {WHY[case.name]}")
        return "\n\n".join(lines)

    def _row(self, contestant: Contestant) -> tuple[str, ...]:
        runs, seconds = self.runs[contestant], self.seconds(contestant)
        return (
            contestant,
            spread(seconds, ".2f"),
            f"{self.flops[contestant] / 1e12:.3g}",
            f"{self.flops[contestant] / median(seconds) / 1e9:,.0f}",
            f"{max(run['peak_memory_bytes'] for run in runs) / 2**30:.2f} GiB",
            f"{runs[0]['nats']:.3f}",
        )

    def _ratio_row(self, peer: Contestant) -> tuple[str, ...]:
        ratios = self.ratios(peer)
        predicted = self.predicted(peer)
        return peer, f"{predicted:.2f}", spread(ratios, ".2f"), f"{median(ratios) / predicted:.2f}"


def as_dict(comparisons: Iterable[Comparison], environment: dict[str, Any]) -> dict[str, Any]:
    """Return all measurements as JSON values."""
    return {"environment": environment, "processor": cpu_name(), "comparisons": list(map(asdict, comparisons))}


def markdown(preset: str, comparisons: list[Comparison], environment: dict[str, Any], repeats: int) -> str:
    """Return the page."""
    git = environment["git"] or {"commit": "unknown", "is_dirty": False}
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    device = comparisons[0].case.device
    hardware = environment["device"] if device == "cuda" else f"{environment['num_cores']} cores {cpu_name()}"
    peers = "\n".join(f"- {name}: {way}" for name, way in WAYS.items())
    return "\n\n".join(
        [
            f"# Zero-shot evaluation compared with other systems: {preset} on {hardware}",
            f"{repeats} repeats, contestants in turn, each in a process of its own with every core; median [least, "
            "most]. Seconds run from the text to the number, without imports and loading. TFLOP are those of products "
            "with weights and of causal attention; lm-eval's padding in a batch is not counted.",
            peers,
            *(comparison.markdown() for comparison in comparisons),
            f"- command: `python tools/benchmarks/evaluate_vs_peers.py {' '.join(environment['command'][1:])}`\n"
            f"- commit: {git['commit']}{' with changes' if git['is_dirty'] else ''}\n"
            f"- versions: Python {environment['python']}, {versions}\n",
        ]
    )
