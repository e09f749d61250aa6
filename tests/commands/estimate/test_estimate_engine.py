"""The states and peak memory of real DeepSpeed engines are those estimated."""

import pytest


def engine_and_estimate(number):
    """Return measured and estimated bytes, in a separate process: joining sets environment variables."""
    import estimates_engine
    from estimates_cases import ENGINES

    recipe = ENGINES[number].recipe
    return estimates_engine.measure(recipe), recipe.footprint(rank=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 3, 4, 5, 6, 8, 10, 12])
def test_an_engine_holds_what_is_estimated(run_ranks, number):
    """Count every byte of a real DeepSpeed engine, as one of several fake ranks."""
    found, footprint = run_ranks(1, engine_and_estimate, number)[0]
    for kind in ("weights", "master_weights", "optimizer"):
        assert getattr(footprint.states, kind) == pytest.approx(getattr(found, kind), rel=0.01), kind
    assert footprint.peak_bytes == pytest.approx(found.peak, rel=0.05)
