"""Fuzz the readers of untrusted files: each must succeed or give a one-line error, in time, and write nothing outside.

    python tools/benchmarks/fuzz.py --target jsonl --runs 10000 --seed 0
    python tools/benchmarks/fuzz.py --target jsonl --runs 1 --seed 4711    # repeat a failure

Case N of a target is a set of valid files, one of them mutated with seed N. Cases run in forked children, so a crash, a
hang or unbounded allocation is recorded as a failure and does not end the program.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # children must not wait for threads of their parent

import psutil
from fuzz_mutate import fresh_copy, mutate
from fuzz_targets import TARGETS, Target

SECONDS = 10.0
"""Limit of processor time per case; on a busy machine WAITING times as many seconds may pass."""
WAITING = 4
BATCH = 200
MEMORY = 6 * 2**30
"""Address space that a case may use on top of the libraries."""
PRINTED = 10
PROGRESS_SECONDS = 10.0
"""Seconds between progress lines."""


@dataclass(slots=True)
class Counts:
    """Outcomes of a target's cases."""

    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    """Seed and description of each case neither accepted nor refused in one line."""

    def __str__(self) -> str:
        """Return the number of cases of each outcome."""
        return ", ".join(f"{number:,} {outcome}" for outcome, number in sorted(self.outcomes.items()))

    def add(self, seed: int, outcome: str, detail: str) -> None:
        """Count a case."""
        self.outcomes[outcome] += 1
        if outcome not in ("accepted", "refused"):
            self.failures.append((seed, f"{outcome}: {detail}"))


@dataclass(slots=True)
class Progress:
    """Progress of a target's cases, printed to stderr every few seconds."""

    name: str
    runs: int
    begin: float = field(default_factory=time.monotonic)
    printed: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the first case."""
        return time.monotonic() - self.begin

    def show(self, counts: Counts) -> None:
        """Print the counts if the last line is old enough."""
        if time.monotonic() - self.printed < PROGRESS_SECONDS:
            return
        self.printed = time.monotonic()
        done = counts.outcomes.total()
        print(f"{self.name}: {done:,} of {self.runs:,} in {self.seconds:.0f} s ({counts})", file=sys.stderr, flush=True)


def fuzz(target: Target, runs: int, seed: int, progress: Progress | None = None) -> Counts:
    """Run the cases `seed` to `seed + runs`."""

    counts = Counts()
    with tempfile.TemporaryDirectory() as root:
        valid = Path(root, "valid")
        valid.mkdir()
        with _quiet():
            target.make(valid)
            target.read(fresh_copy(valid, Path(root, "warm", "case")))  # imports, once for all children
        next_seed, end = seed, seed + runs
        while next_seed < end:
            for case, outcome, detail in _batch(target, Path(root), range(next_seed, min(end, next_seed + BATCH))):
                counts.add(case, outcome, detail)
                next_seed = case + 1
                if progress is not None:
                    progress.show(counts)
    return counts


def _batch(target: Target, root: Path, seeds: range) -> Iterator[tuple[int, str, str]]:
    """Yield the outcome of each case until the last, or until one that kills the child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            _run_cases(target, root, seeds, writer)
        finally:
            os._exit(0)  # the parent removes the folder
    os.close(writer)
    with os.fdopen(reader, "rb") as lines:
        for seed in seeds:
            if not _answers(lines.fileno(), child):
                os.kill(child, signal.SIGKILL)
                yield seed, "hangs", f"more than {SECONDS:.0f} s"
                break
            line = os.read(lines.fileno(), 4096).decode()
            if not line:
                yield seed, "crashes", _end_of(child)
                return
            outcome, _, detail = line.partition(" ")
            yield seed, outcome, detail
            os.write(ACKNOWLEDGE[1], b".")
    os.waitpid(child, 0)


def _answers(reader: int, child: int) -> bool:
    """Wait for the outcome of a case; return whether it comes in time."""
    process = psutil.Process(child)
    begin, used = time.monotonic(), sum(process.cpu_times()[:2])
    while not select.select([reader], [], [], SECONDS / 20)[0]:
        if sum(process.cpu_times()[:2]) - used > SECONDS or time.monotonic() - begin > WAITING * SECONDS:
            return False
    return True


def _end_of(child: int) -> str:
    """Wait for a process and return the name of the signal that ended it, or its exit code."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


ACKNOWLEDGE = os.pipe()
"""The child waits for the parent between cases, so that a line is a read."""


def _run_cases(target: Target, root: Path, seeds: range, writer: int) -> None:
    faulthandler.disable()  # the parent reports a crash, with the seed that repeats it
    if len(seeds) > 1:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # output of native libraries
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for seed in seeds:
        outcome, detail = run_case(target, root / "valid", root, seed)
        os.write(writer, f"{outcome} {detail}"[:1000].replace("\n", " | ").encode())
        os.read(ACKNOWLEDGE[0], 1)


def run_case(target: Target, valid: Path, root: Path, seed: int) -> tuple[str, str]:
    """Mutate a copy of the valid files with the seed, read it, and return the outcome."""
    from megaft.base.errors import UserError

    rng = random.Random(seed)
    folder = root / "cases" / "case"
    fresh_copy(valid, folder)
    files = sorted(path for pattern in target.files for path in folder.glob(pattern) if path.is_file())
    mutate(rng.choice(files), rng)
    if target.mend is not None:
        target.mend(folder)
    try:
        with _quiet():
            target.read(folder)
        outcome, detail = "accepted", ""
    except UserError as error:
        outcome, detail = ("refused", "") if "\n" not in str(error) else ("lines", str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = [
            one
            for one in traceback.extract_tb(error.__traceback__)
            if "megaft/" in one.filename or "evaluate_" in one.filename
        ]
        last = ours[-1] if ours else frame
        where = f"{Path(last.filename).name}:{last.lineno}"
        outcome, detail = "traceback", f"{where} {type(error).__name__} {str(error)[:150]}"
    outside = [path.name for path in (root / "cases").iterdir() if path.name != "case"]
    return ("outside", f"{outside}") if outside else (outcome, detail)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def main() -> int:
    """Fuzz one target or all; print counts and the first failures of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--runs", type=int, default=1000, help="cases of each target")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    arguments = parser.parse_args()
    failed = 0
    for name in TARGETS if arguments.target == "all" else [arguments.target]:
        progress = Progress(name, arguments.runs)
        counts = fuzz(TARGETS[name], arguments.runs, arguments.seed, progress)
        print(f"{name}: {counts}; {progress.seconds:.0f} s", flush=True)
        kinds: dict[str, int] = {}
        for seed, what in counts.failures:
            kinds.setdefault(" ".join(what.split()[:3]), seed)
        for seed in list(kinds.values())[:PRINTED]:
            detail = next(text for case, text in counts.failures if case == seed)
            print(f"  --target {name} --seed {seed} --runs 1: {detail}", flush=True)
        failed += len(counts.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
