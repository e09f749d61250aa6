"""A dozen model families through every check on one rank; docs/families.md covers all causal families."""

import os

import pytest
from families import PARTS, QUICK

ON_ONE_RANK = PARTS[:-1]


def try_families():
    from families import try_family

    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ))
    parallel.start_tensor_parallelism(1)
    rows = {name: try_family(name, ON_ONE_RANK) for name in QUICK}
    parallel.leave()
    return rows


@pytest.mark.slow
def test_no_family_is_silently_wrong(run_ranks):
    (rows,) = run_ranks(1, try_families)
    kinds = {name: {part: cell.partition(":")[0] for part, cell in row.items()} for name, row in rows.items()}
    assert {kind for row in kinds.values() for kind in row.values()} == {"right", "refused"}, rows
    assert kinds["llama"] == dict.fromkeys(ON_ONE_RANK, "right")
    looks_ahead = [name for name, row in kinds.items() if row["trains"] == "refused"]
    assert looks_ahead == ["bert as an encoder", "xlm"]
    assert [name for name in QUICK if kinds[name]["scores"] == "refused"] == looks_ahead
    assert kinds["mamba"]["generates"] == kinds["llama4_text"]["trains"] == kinds["mamba"]["ZeRO-3"] == "right"
