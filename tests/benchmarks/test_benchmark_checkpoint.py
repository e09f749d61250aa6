import os
from pathlib import Path
from types import SimpleNamespace

import checkpoint_cost
import checkpoint_cost_ranks
import pytest
from checkpoint_cost import Arguments, markdown, measure, ratios
from prepare import short


def be_a_rank(output, folder, stage, millions, repeats):
    os.sync = lambda: None  # would wait for all that other programs write
    checkpoint_cost_ranks.main(Path(output), Path(folder), int(stage), float(millions), int(repeats))


@pytest.fixture
def forked(run_ranks, monkeypatch):
    """Ranks are started from the fork server, with what the launcher would give them."""

    def run(command, **_):
        script = command.index(checkpoint_cost_ranks.__file__)
        run_ranks(int(command[command.index("--nproc-per-node") + 1]), be_a_rank, *command[script + 1 :])

    monkeypatch.setattr(checkpoint_cost, "subprocess", SimpleNamespace(run=run))


@pytest.mark.slow
def test_every_way_saves_the_whole_state(forked, memory_folder):
    case = measure("2x2", Arguments(millions=4.7, repeats=1, folder=memory_folder))
    assert case["parameters"] == pytest.approx(4.7e6, rel=0.01)
    assert {len(runs) for runs in case["runs"].values()} == {1}
    for name, runs in case["runs"].items():
        for run in runs:
            assert 0 < run["blocking_seconds"] <= run["seconds"] * 1.001
            assert run["bytes"] == pytest.approx(
                case["state_bytes"] * (16 / 12 if "deepspeed" in name else 1), rel=0.02
            )
    assert list(memory_folder.iterdir()) == []


def test_a_page_says_how_many_times_longer_training_waits_for_the_peer():
    ours, theirs = (
        [{"blocking_seconds": s, "seconds": s, "bytes": 12} for s in seconds] for seconds in ([1, 2], [3, 4])
    )
    runs = {"megaft": ours, "deepspeed": theirs}
    assert ratios(runs, "megaft", "deepspeed") == [3, 2]
    case = {"num_ranks": 1, "stage": 0, "parameters": 1e6, "state_bytes": 12e6, "runs": runs}
    where = {"git": None, "command": ["x", short("/somebody/of/this/disk")], "num_cores": 2, "packages": {"torch": "2"}}
    text = markdown({"environment": where, "processor": "p", "load": [0.0, 1.0], "cases": {"1x0": case}})
    assert "| megaft | 1.50 [1.00, 2.00] | 0.01 | 1.50 | 0.00 |" in text
    assert "| megaft | 2.50 [2.00, 3.00] |" in text
    assert "/somebody" not in text
