"""Limits of DeepSpeed's parallel schemes in docs/parallelism.md, tested so that an upstream fix is noticed."""

import os

import pytest


def relative_differences(scheme, stages):
    """The largest of losses, and the first gradient norm's ratio, of every stage on every rank."""
    import torch
    from deepspeed_parallel import LENGTH, ROWS, alone, together

    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ))
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    losses, norms = alone(0.0, positions)  # before the scheme makes attention another
    found = {}
    for stage in stages:
        found_losses, found_norms = together(scheme, stage, 0.0, positions)
        pairs = zip(found_losses, losses, strict=True)
        found[stage] = max(abs(ours / theirs - 1) for ours, theirs in pairs), float(found_norms[0]) / norms[0]
    parallel.leave()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "expected"),  # by stage
    [
        pytest.param("autotp", {1: (0, 1)}, id="AutoTP is exact"),
        pytest.param("ulysses", {3: (0, 1), 1: (0.011, 2)}, id="Ulysses doubles the gradient at stage 1, not at 3"),
    ],
)
def test_two_ranks_beside_one(scheme, expected, run_ranks):
    for found in run_ranks(2, relative_differences, scheme, [*expected]):
        assert found.keys() == expected.keys()
        for stage, (loss, norm) in expected.items():
            assert found[stage] == (pytest.approx(loss, abs=1e-3 if loss else 1e-6), pytest.approx(norm, rel=1e-6))
