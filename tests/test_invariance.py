"""The first promise: one run, cut in every way of the table in docs/invariance.md that is in fp32."""

import pytest
from invariance import LEARNING_RATE, TOLERANCE, WAYS, make_inputs, outcomes, run_ways

pytestmark = pytest.mark.slow

STEPS = 20
EXACT = [way for way in WAYS if way.precision == "fp32"]


@pytest.fixture(scope="module")
def measured(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    make_inputs(folder)
    for world_size in sorted({way.world_size for way in EXACT}):
        run_ranks(world_size, run_ways, folder, [way for way in EXACT if way.world_size == world_size], STEPS)
    return {outcome.way.name: outcome for outcome in outcomes(folder, tuple(EXACT), STEPS)}


@pytest.mark.parametrize("way", [way.name for way in EXACT])
def test_losses_and_weights_do_not_depend_on_the_cut(measured, way):
    outcome = measured[way]
    assert outcome.last_loss < outcome.first_loss
    assert outcome.loss_difference <= 1e-5
    assert outcome.norm_difference <= 1e-5
    assert outcome.weight_difference <= 1e-5


def test_the_promise_is_the_one_made():
    assert (TOLERANCE, LEARNING_RATE) == (1e-5, 1e-3)
    assert {way.world_size for way in EXACT} == {1, 2, 4}
    assert {way.zero_stage for way in EXACT} == {0, 1, 2, 3}
    assert {way.optimizer for way in EXACT} == {"adamw", "sgd"}
    assert any(way.is_offloaded for way in EXACT)
    for size in (2, 4):
        assert {way.zero_stage for way in EXACT if way.tensor_parallel_size == size} == {0, 1, 2, 3}
