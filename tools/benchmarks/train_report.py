"""Report of the training benchmark: medians over repeats, with minimum and maximum in brackets."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from train_case import BETAS, GRADIENT_CLIPPING, LEARNING_RATE, WEIGHT_DECAY, Case
from train_launch import Contestant, Run

FIRST_LOSS_TOLERANCE = 0.05
"""Tolerance in nats per token: systems start from equal weights but other samples. A wrong scale is far outside."""

WAYS = {
    "megaft": "`deepspeed megaft/train.py`",
    "trainer": "transformers' Trainer, same DeepSpeed JSON and launcher, adamw_torch_fused",
    "torch": "torch loop: fp32 weights, autocast for bf16, fused AdamW, DDP on several ranks; torchrun",
    "compiled": "the same torch loop, with `torch.compile(model)`",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A case, its runs in order, and their environment."""

    case: Case
    runs: tuple[Run, ...]
    environment: dict[str, Any]
    """As `megaft.base.environment` gives it."""
    flops_per_token: int

    @property
    def contestants(self) -> list[Contestant]:
        """Systems that finished at least once, in the order they ran."""
        return list(dict.fromkeys(run.contestant for run in self.runs if run.failure is None))

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOPs of one device; if megaft measures it at every start, the largest value."""
        return max((run.peak_flops for run in self.runs if run.peak_flops), default=None)

    def finished(self, contestant: Contestant) -> list[Run]:
        """Finished runs of a system, in order."""
        return [run for run in self.runs if run.contestant == contestant and run.failure is None]

    def tokens_per_second(self, contestant: Contestant) -> list[float]:
        """Per device, from the median step after warm-up of each run."""
        tokens = self.case.tokens_per_step / self.case.num_ranks
        return [tokens / median(run.step_seconds[self.case.warm_up_steps :]) for run in self.finished(contestant)]

    def ratios(self, one: Contestant, other: Contestant) -> list[float]:
        """Return the speed of `one` relative to `other`, repeat by repeat."""
        return [a / b for a, b in zip(self.tokens_per_second(one), self.tokens_per_second(other), strict=False)]

    def first_loss_difference(self) -> float:
        """Return the largest difference between the systems' losses of step 1, in nats per token."""
        losses = [run.losses[0] for run in self.runs if run.failure is None]
        return max(losses, default=0.0) - min(losses, default=0.0)

    @property
    def is_sound(self) -> bool:
        """Return whether every system ran, and all started at the same loss."""
        return all(run.failure is None for run in self.runs) and self.first_loss_difference() <= FIRST_LOSS_TOLERANCE

    def as_dict(self) -> dict[str, Any]:
        """Return all measurements as JSON values."""
        return asdict(self) | {"hardware": self.hardware, "tokens_per_step": self.case.tokens_per_step}

    @property
    def hardware(self) -> str:
        """Hardware of the run."""
        if self.case.device == "cuda":
            return f"{self.case.num_ranks} x {self.environment['device']}"
        return f"{self.environment['num_cores']} cores {cpu_name()}"

    @property
    def file_name(self) -> str:
        """File name without a suffix: case, hardware and month."""
        is_cuda = self.case.device == "cuda"
        hardware = self.hardware if is_cuda else f"{self.environment['num_cores']}-cores-{platform.machine()}"
        slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower())
        return f"train-{self.case.label}_{slug}_{datetime.now(UTC):%Y%m}"

    def markdown(self) -> str:
        """Return the page."""
        parts = [f"# Training {self.case.label} on {self.hardware}", self._setting(), self._speeds()]
        parts += [self._ratios(), self._notes(), self._provenance()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _setting(self) -> str:
        case = self.case
        return (
            f"{case.num_ranks} rank(s), {case.context_length} tokens x micro-batch {case.micro_batch_size} x "
            f"{case.accumulation} accumulation = {case.tokens_per_step:,} tokens per step; {case.dtype}, dropout "
            f"{case.dropout:g}, {case.recipe.format(dtype=case.dtype)}, AdamW {LEARNING_RATE:g} {BETAS} decay "
            f"{WEIGHT_DECAY}, clipping {GRADIENT_CLIPPING:g}, sdpa attention. {case.steps} step(s) after "
            f"{case.warm_up_steps} of warm-up; {self._num_repeats()} repeat(s), contestants in turn. Median of the "
            "repeats' median steps [least, most]."
        )

    def _num_repeats(self) -> int:
        return max((len(self.finished(contestant)) for contestant in self.contestants), default=0)

    def _speeds(self) -> str:
        header = ("contestant", "tokens/s per device", "MFU", "peak memory", "s to first step", "first loss", "last")
        return table(header, (self._speed_row(contestant) for contestant in self.contestants))

    def _speed_row(self, contestant: Contestant) -> tuple[str, ...]:
        runs, speeds = self.finished(contestant), self.tokens_per_second(contestant)
        peak = self.peak_flops
        return (
            f"{contestant}: {WAYS[contestant]}",
            spread(speeds, ",.0f" if median(speeds) >= 1000 else ".1f"),
            f"{median(speeds) * self.flops_per_token / peak:.1%}" if peak else "-",
            f"{max(run.peak_memory_bytes for run in runs) / 2**30:.2f} GiB",
            spread([run.seconds_to_first_step for run in runs], ".1f"),
            f"{runs[0].losses[0]:.4f}",
            f"{runs[0].losses[-1]:.4f}",
        )

    def _ratios(self) -> str:
        if "megaft" not in self.contestants:
            return ""
        peers: list[Contestant] = [contestant for contestant in self.contestants if contestant != "megaft"]
        rows = ((f"megaft / {peer}", spread(self.ratios("megaft", peer), ".3f")) for peer in peers)
        return table(("tokens/s, repeat by repeat", "ratio"), rows) if peers else ""

    def _notes(self) -> str:
        peak = f"MFU counts {self.flops_per_token / 1e9:.4g} GFLOP a token (6N + 12LdT)"
        lines = [f"{peak} of {self.peak_flops / 1e12:.3g} TFLOP/s a device." if self.peak_flops else f"{peak}."]
        memory = "allocated by torch" if self.case.device == "cuda" else "resident in the process"
        lines.append(f"Memory is the main rank's, {memory}, up to the last step.")
        if len(self.contestants) > 1:
            difference = self.first_loss_difference()
            verdict = "agree" if difference <= FIRST_LOSS_TOLERANCE else "DISAGREE"
            lines.append(f"First losses {verdict}: within {difference:.4f} nats, on samples of each one's own order.")
        lines += [f"{run.contestant} failed: {run.failure}" for run in self.runs if run.failure]
        return "\n".join(f"- {line}" for line in lines)

    def _provenance(self) -> str:
        where = self.environment
        git = where["git"] or {"commit": "unknown", "is_dirty": False}
        versions = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
        return (
            f"Commit {git['commit']}{' with changes' if git['is_dirty'] else ''}; Python {where['python']}, {versions}"
            f"{', CUDA ' + where['cuda'] if where['cuda'] else ''}; {where['platform']}.\n\n"
            f"    python tools/benchmarks/train.py {' '.join(where['command'][1:])}"
        )


def spread(values: list[float], form: str) -> str:
    """Return the median, with minimum and maximum if there are several values."""
    middle = format(median(values), form)
    return middle if len(values) == 1 else f"{middle} [{min(values):{form}}, {max(values):{form}}]"


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_name() -> str:
    """Return the processor's name from Linux, or else the machine type."""
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()
