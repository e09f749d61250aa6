"""Changed files are read or refused in one line: a hundred of each kind, in this process.

tools/benchmarks/fuzz.py runs as many as wanted, in children that may hang or crash, and of slower readers too.
"""

import random

import fuzz
import pytest
from fuzz_mutate import mutate
from fuzz_targets import TARGETS

FAST = {"generation-config", "deepspeed-json", "prepared", "checkpoint", "rows"}
BY_HAND = {"model-config"}
"""transformers builds a million layers where config.json says so, which takes minutes before anything is compared."""
RUNS = 100


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in TARGETS if name not in BY_HAND],
)
def test_changed_files_are_read_or_refused(name, tmp_path):
    target, valid = TARGETS[name], tmp_path / "valid"
    valid.mkdir()
    target.make(valid)
    target.read(valid)  # unchanged it is sound
    outcomes = {seed: fuzz.run_case(target, valid, tmp_path, seed) for seed in range(RUNS)}
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


def test_children_that_hang_or_crash_are_findings(monkeypatch):
    import os
    import time

    def read(folder):
        content = (folder / "a.txt").read_bytes()
        if len(content) % 3 == 0:
            os.abort()
        if len(content) % 3 == 1:
            time.sleep(60)

    target = fuzz.Target(lambda folder: (folder / "a.txt").write_bytes(b"a" * 30) and None, read, ("a.txt",))
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    counts = fuzz.fuzz(target, 4, 0)
    assert sum(counts.outcomes.values()) == 4
    assert {"crashes", "hangs"} & set(counts.outcomes)
