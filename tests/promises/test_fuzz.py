"""Mutated files are read or refused in one line: a hundred per target, fewer of slow ones, in this process.

tools/benchmarks/fuzz.py runs as many as wanted, in children that may hang or crash, and of slower readers too.
"""

import os
import random
import time

import fuzz
import pytest
from fuzz_mutate import mutate
from fuzz_targets import TARGETS

FAST = {"estimate", "generation-config", "deepspeed-json", "prepared", "checkpoint", "rows"}
RUNS, SLOW_RUNS = 100, 25


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TARGETS],
)
def test_changed_files_are_read_or_refused(name, tmp_path):
    target, valid = TARGETS[name], tmp_path / "valid"
    valid.mkdir()
    target.make(valid)
    target.read(valid)  # unchanged it is sound
    outcomes = {
        seed: fuzz.run_case(target, valid, tmp_path, seed) for seed in range(RUNS if name in FAST else SLOW_RUNS)
    }
    assert {seed: case for seed, case in outcomes.items() if case[0] not in ("accepted", "refused")} == {}
    has_another = name in ("rows", "checkpoint")  # a broken line is left out, an older checkpoint taken
    assert has_another or "refused" in {case[0] for case in outcomes.values()}


def test_a_mutation_is_a_function_of_its_seed(tmp_path):
    copies = []
    for number in range(2):
        path = tmp_path / f"{number}.json"
        path.write_text('{"a": [1, 2], "b": "c"}')
        mutate(path, random.Random(11))
        copies.append(path.read_bytes())
    assert copies[0] == copies[1]
    assert copies[0] != b'{"a": [1, 2], "b": "c"}'


def test_children_that_hang_or_crash_are_findings(monkeypatch, capfd):
    valid = b"a" * 30

    def read(folder):
        content = (folder / "a.txt").read_bytes()
        if content != valid and len(content) % 2:
            os.abort()
        if content != valid:
            time.sleep(60)

    target = fuzz.Target(lambda folder: (folder / "a.txt").write_bytes(valid) and None, read, ("a.txt",))
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    counts = fuzz.fuzz(target, 4, 0)
    assert sum(counts.outcomes.values()) == 4
    assert {"crashes: SIGABRT", "hangs: more than 0 s"} == {said for _, said in counts.failures}
    assert "Fatal Python error" not in capfd.readouterr().err


def test_progress_is_printed_every_few_seconds(capsys):
    counts, progress = fuzz.Counts(), fuzz.Progress("jsonl", 2000)
    for seed in range(1200):
        counts.add(seed, "refused" if seed % 3 else "accepted", "")
        progress.show(counts)
    assert capsys.readouterr().err == ""
    progress.printed -= fuzz.PROGRESS_SECONDS
    progress.show(counts)
    progress.show(counts)
    assert capsys.readouterr().err == "jsonl: 1,200 of 2,000 in 0 s (400 accepted, 800 refused)\n"
