"""Time megaft's checkpoints and DeepSpeed's `engine.save_checkpoint` on the same engine, alternating.

    python tools/benchmarks/checkpoint_cost.py --folder /a/local/disk --repeats 5

The state is AdamW's in fp32: a weight and two moments, 12 bytes per parameter.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import launchers
import tyro
from prepare import short
from train_report import cpu_name, spread, table

from megaft.base.environment import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CASE_DESCRIPTIONS = {
    "megaft": "weights and moments once, sharded over ranks; synced, hashed, renamed into place",
    "megaft --checkpoint.async": "the same; training waits for a copy in memory, and later for the rename",
    "deepspeed": "`engine.save_checkpoint`; neither synced nor hashed; a crash leaves half of it",
    "deepspeed + fsync + SHA-256": "the same, then every file synced and hashed, shared by the ranks",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Time megaft's checkpoints and DeepSpeed's."""

    cases: tuple[str, ...] = ("1x0", "1x2", "2x0", "2x2", "2x3")
    """Ranks and ZeRO stage."""
    millions: float = 85.0
    """Parameters, 12 bytes each."""
    repeats: int = 5
    """Timed saves of each kind, after one to warm up."""
    folder: Path | None = None
    """Folder on the disk to test. By default a temporary one."""
    hardware: str = f"cpu{os.cpu_count()}"
    """Name of the hardware in the result files."""


def main(arguments: Arguments) -> None:
    """Run all cases, and write results/checkpoint_cost_HARDWARE_YYYYMM.json and .md."""
    load_before = os.getloadavg()[0]
    measured = {case: measure(case, arguments) for case in arguments.cases}
    load = [load_before, os.getloadavg()[0]]
    where = environment()
    where["command"] = list(map(short, where["command"]))
    report = {"environment": where, "processor": cpu_name(), "load": load, "cases": measured}
    stem = RESULTS / f"checkpoint_cost_{arguments.hardware}_{datetime.now(UTC):%Y%m}"
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def measure(case: str, arguments: Arguments) -> dict[str, Any]:
    """Launch the ranks of one case, such as 2x3, and return their measurements."""
    num_ranks, stage = case.split("x")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        output = Path(folder) / "figures.json"
        command = launchers.torchrun(int(num_ranks))
        command += [str(HERE / "checkpoint_cost_ranks.py"), str(output), f"{folder}/run", stage]
        command += [str(arguments.millions), str(arguments.repeats)]
        threads = max(1, (os.cpu_count() or 1) // int(num_ranks))
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"})
        return json.loads(output.read_text()) | {"num_ranks": int(num_ranks), "stage": int(stage)}


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    where = report["environment"]
    return "\n".join(
        [
            "# megaft's checkpoints compared with DeepSpeed's\n",
            "Seconds that training waits for one save, and the state (a weight and two moments in fp32, 12 bytes per "
            "parameter) that is saved in one of them; the slowest rank's, median [least, most], by turns into an empty "
            "folder. Of the asynchronous way also the seconds until the checkpoint is published.\n",
            *(f"- {name}: {what}" for name, what in CASE_DESCRIPTIONS.items()),
            *(part for case in report["cases"].values() for part in page(case)),
            f"\n- command: `python tools/benchmarks/checkpoint_cost.py {' '.join(where['command'][1:])}`",
            f"- commit: {where['git'] and where['git']['commit']}",
            f"- hardware: {report['processor']}, {where['num_cores']} cores; "
            f"load average {report['load'][0]:.1f} before and {report['load'][1]:.1f} after, its own work included",
            f"- versions: {', '.join(f'{name} {number}' for name, number in where['packages'].items())}\n",
        ]
    )


def page(case: dict[str, Any]) -> list[str]:
    """Return one case's heading, figures and ratios."""
    header = ("way", "s training waits", "GB/s", "s until published", "GB written")
    peers = [name for name in case["runs"] if name.startswith("deepspeed")]
    ours = [name for name in case["runs"] if name not in peers]
    return [
        f"\n## {case['num_ranks']} rank(s), ZeRO {case['stage']}, {case['parameters'] / 1e6:.0f} million parameters\n",
        table(header, (row(name, runs, case["state_bytes"]) for name, runs in case["runs"].items())),
        "",
        table(
            ("times faster, repeat by repeat", *(f"than {peer}" for peer in peers)),
            ((name, *(spread(ratios(case["runs"], name, peer), ".2f") for peer in peers)) for name in ours),
        ),
    ]


def row(name: str, runs: list[dict[str, float]], state_bytes: int) -> tuple[str, ...]:
    """Return the table's line for one way of saving."""
    waits = [run["blocking_seconds"] for run in runs]
    speed = state_bytes / 1e9 / statistics.median(waits)
    published = statistics.median(run["seconds"] for run in runs)
    return name, spread(waits, ".2f"), f"{speed:.2f}", f"{published:.2f}", f"{runs[0]['bytes'] / 1e9:.2f}"


def ratios(runs: dict[str, list[dict[str, float]]], name: str, peer: str) -> list[float]:
    """Return the peer's blocking time over megaft's, repeat by repeat."""
    pairs = zip(runs[peer], runs[name], strict=True)
    return [theirs["blocking_seconds"] / ours["blocking_seconds"] for theirs, ours in pairs]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
