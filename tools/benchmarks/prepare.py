"""Time `megaft prepare` against a bare `tokenizers` loop on the same text and cores, alternating.

    python tools/benchmarks/prepare.py TEXT --tokenizer FOLDER --megabytes 540 --repeats 3

Both are whole processes, imports included. The loop reads the file in blocks of the same size, encodes them in batches
of the same size and collects the ids. It does not decode, count, hash or write, and splits words at block ends.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from train_report import cpu_name, spread, table

from megaft.base.environment import environment

RESULTS = Path(__file__).parent / "results"
BARE_LOOP = """
import sys
from tokenizers import Tokenizer
tokenizer, total = Tokenizer.from_file(sys.argv[1]), 0
with open(sys.argv[2], encoding="utf-8", newline="") as file:
    while batch := [block for _ in range(256) if (block := file.read(1 << 13))]:
        total += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
print(total)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Time `megaft prepare` against a bare `tokenizers` loop."""

    text: tyro.conf.Positional[Path]
    """Repeated to --megabytes."""
    tokenizer: str
    """A folder with tokenizer.json, or any tokenizer that `megaft prepare` accepts."""
    megabytes: int = 50
    """Size of the tokenized text."""
    repeats: int = 3
    """Runs of each program."""
    hardware: str = f"cpu{os.cpu_count()}"
    """Name of the hardware in the result files."""


def main(arguments: Arguments) -> None:
    """Run the comparison, and write results/prepare_HARDWARE_YYYYMM.json and .md."""
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(arguments, Path(folder))
    where = environment()
    where["command"] = list(map(short, where["command"]))
    report = {"environment": where, "processor": cpu_name(), **measured}
    stem = RESULTS / f"prepare_{arguments.hardware}_{datetime.now(UTC):%Y%m}"
    RESULTS.mkdir(exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def measure(arguments: Arguments, folder: Path) -> dict[str, Any]:
    """Run both programs alternately, `arguments.repeats` times each."""
    text = folder / "text.txt"
    num_bytes = repeat(arguments.text, text, arguments.megabytes * 1_000_000)
    vocabulary = save_tokenizer(arguments.tokenizer, folder)
    megaft = str(Path(sys.executable).with_name("megaft"))
    programs = {
        "megaft": [megaft, "prepare", str(text), "--output", f"{folder}/out", "--tokenizer", arguments.tokenizer],
        "bare": [sys.executable, "-c", BARE_LOOP, str(vocabulary), str(text)],
    }
    runs = {name: [] for name in programs}
    for _ in range(arguments.repeats):
        for name, command in programs.items():
            runs[name].append(timed(command, num_bytes))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    tokens = json.loads((folder / "out.json").read_text())["tokens"]
    ratios = [
        ours["megabytes_per_second"] / theirs["megabytes_per_second"]
        for ours, theirs in zip(runs["megaft"], runs["bare"], strict=True)
    ]
    return {"bytes": num_bytes, "tokens": tokens, "runs": runs, "ratios": ratios}


def repeat(source: Path, target: Path, num_bytes: int) -> int:
    """Write `source` as many times as fit into `num_bytes`, at least once; return the bytes written."""
    data = source.read_bytes()
    with target.open("wb") as file:
        return sum(file.write(data) for _ in range(max(1, num_bytes // len(data))))


def save_tokenizer(source: str, folder: Path) -> Path:
    """Save the tokenizer for the bare loop; return its tokenizer.json."""
    program = (
        "import sys; from megaft.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).save(sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, source, str(folder)], check=True)
    return folder / "tokenizer.json"


def timed(command: list[str], num_bytes: int) -> dict[str, float]:
    """Run a command; return its wall time, throughput, processor time and peak memory, children included."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(command)} failed with {os.waitstatus_to_exitcode(status)}")
    return {
        "seconds": seconds,
        "megabytes_per_second": num_bytes / 1e6 / seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,  # Linux counts KiB
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    where, num_runs = report["environment"], len(report["ratios"])
    command = " ".join(where["command"][1:])
    header = ("whole process", "MB/s, median [least, most]", "processor s", "peak memory, at most")
    return "\n".join(
        [
            "# megaft prepare compared with a bare `encode_batch_fast` loop\n",
            f"{report['bytes'] / 1e6:,.0f} MB, {report['tokens']:,} tokens, {num_runs} runs each, by turns.\n",
            table(header, (row(name, runs) for name, runs in report["runs"].items())),
            f"\nmegaft / bare: {spread(report['ratios'], '.2f')}\n",
            "Linux starts a child's peak at its parent's, here the 0.2 GiB of the script that measures.\n",
            f"- command: `python tools/benchmarks/prepare.py {command}`",
            f"- commit: {where['git'] and where['git']['commit']}",
            f"- hardware: {report['processor']}, {where['num_cores']} cores",
            f"- versions: {', '.join(f'{name} {number}' for name, number in where['packages'].items())}\n",
        ]
    )


def short(argument: str) -> str:
    """Return an argument without the machine's folders."""
    return "/".join(Path(argument).parts[-2:]) if "/" in argument else argument


def row(name: str, runs: list[dict[str, float]]) -> tuple[str, ...]:
    """Return one program's line of the table."""
    cpu = statistics.median(run["cpu_seconds"] for run in runs)
    peak = max(run["peak_memory_bytes"] for run in runs) / 2**30
    return name, spread([run["megabytes_per_second"] for run in runs], ".2f"), f"{cpu:.0f}", f"{peak:.2f} GiB"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
