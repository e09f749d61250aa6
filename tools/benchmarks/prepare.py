"""Time `megaft prepare` beside a bare loop over `tokenizers`, on the same text and cores, one after the other.

    python tools/benchmarks/prepare.py TEXT --tokenizer FOLDER --megabytes 540 --repeats 3

Both are whole processes, imports included. The loop reads the file in blocks of the same size, encodes them in batches
of the same size and takes their ids; it decodes, counts, hashes and writes nothing, and cuts words at block ends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Run the comparison, and write results/prepare_HARDWARE_YYYYMM.json and .md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="repeated to --megabytes")
    parser.add_argument("--tokenizer", required=True, help="a folder with tokenizer.json, or what megaft prepare takes")
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hardware", default=f"cpu{os.cpu_count()}", help="a name for the result files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(options, Path(folder))
    stem = RESULTS / f"prepare_{options.hardware}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both programs by turns, `options.repeats` times each."""
    text = folder / "text.txt"
    num_bytes = repeat(options.text, text, options.megabytes * 1_000_000)
    vocabulary = save_tokenizer(options.tokenizer, folder)
    megaft = str(Path(sys.executable).with_name("megaft"))
    programs = {
        "megaft": [megaft, "prepare", str(text), "--output", f"{folder}/out", "--tokenizer", options.tokenizer],
        "bare": [sys.executable, "-c", BARE_LOOP, str(vocabulary), str(text)],
    }
    runs = {name: [] for name in programs}
    for _ in range(options.repeats):
        for name, command in programs.items():
            runs[name].append(timed(command, num_bytes))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    tokens = json.loads((folder / "out.json").read_text())["tokens"]
    ratios = [
        ours["megabytes_per_second"] / theirs["megabytes_per_second"]
        for ours, theirs in zip(runs["megaft"], runs["bare"], strict=True)
    ]
    return {**environment(), "bytes": num_bytes, "tokens": tokens, "runs": runs, "ratios": ratios}


def repeat(source: Path, target: Path, num_bytes: int) -> int:
    """Write `source` as often as fits into `num_bytes`, at least once; return the bytes written."""
    data = source.read_bytes()
    with target.open("wb") as file:
        return sum(file.write(data) for _ in range(max(1, num_bytes // len(data))))


def save_tokenizer(source: str, folder: Path) -> Path:
    """Save the tokenizer where the bare loop can read it; return its tokenizer.json."""
    program = "import sys; from megaft.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).save(sys.argv[2])"
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


def environment() -> dict[str, Any]:
    """Return what the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=RESULTS)
    return {
        "command": f"python tools/benchmarks/prepare.py {' '.join(map(short, sys.argv[1:]))}",
        "commit": commit.stdout.strip(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("megaft", "tokenizers", "transformers", "megatron-core", "torch")},
    }


def short(argument: str) -> str:
    """Return an argument without the folders only this machine has."""
    return "/".join(Path(argument).parts[-2:]) if "/" in argument else argument


def processor() -> str:
    """Return the processor's name, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    ratios = report["ratios"]
    rows = [row(name, runs) for name, runs in report["runs"].items()]
    return "\n".join(
        [
            "# megaft prepare beside a bare `encode_batch_fast` loop",
            "",
            f"{report['bytes'] / 1e6:,.0f} MB, {report['tokens']:,} tokens, {len(ratios)} runs each, by turns.",
            "",
            "| whole process | MB/s (median, range) | processor s | peak memory |",
            "|---|---|---|---|",
            *rows,
            "",
            f"megaft / bare: **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
            "",
            f"- command: `{report['command']}`",
            f"- commit: {report['commit']}",
            f"- hardware: {report['processor']}, {report['cores']} cores",
            f"- versions: {', '.join(f'{name} {number}' for name, number in report['versions'].items())}",
            "",
        ]
    )


def row(name: str, runs: list[dict[str, float]]) -> str:
    """Return one program's line of the table."""
    speeds = [run["megabytes_per_second"] for run in runs]
    cpu = statistics.median(run["cpu_seconds"] for run in runs)
    peak = max(run["peak_memory_bytes"] for run in runs) / 2**30
    speed = f"{statistics.median(speeds):.2f} ({min(speeds):.2f} to {max(speeds):.2f})"
    return f"| {name} | {speed} | {cpu:.0f} | {peak:.2f} GiB |"


if __name__ == "__main__":
    main()
