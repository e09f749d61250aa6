import pytest
from checkpoint_cost import Arguments, markdown, measure, ratios
from prepare import short


@pytest.mark.slow
def test_every_way_saves_the_whole_state(tmp_path):
    case = measure("2x2", Arguments(millions=4.7, repeats=2, folder=tmp_path))
    assert case["parameters"] == pytest.approx(4.7e6, rel=0.01)
    assert {len(runs) for runs in case["runs"].values()} == {2}
    for name, runs in case["runs"].items():
        for run in runs:
            assert 0 < run["blocking_seconds"] <= run["seconds"] * 1.001
            assert run["bytes"] == pytest.approx(
                case["state_bytes"] * (16 / 12 if "deepspeed" in name else 1), rel=0.02
            )
    assert list(tmp_path.iterdir()) == []


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
