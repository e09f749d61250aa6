"""The first promise: one run, split like each kind of row of the table in docs/invariance.md."""

import pytest
from invariance import LEARNING_RATE, REFERENCES, TOLERANCE, WAYS, Way, make_inputs, outcomes, run_ways, weights_of

from megaft.weights.loading.pretrained import load_language_model

pytestmark = pytest.mark.slow

STEPS = 6
EXACT = [way for way in WAYS if way.precision == "fp32"]
TRIED = [
    *(REFERENCES[optimizer, "fp32"] for optimizer in ("adamw", "sgd")),
    Way(1, 1, 1),
    Way(1, 4, 3),
    Way(1, 4, 2, tensor_parallel_size=1),
    Way(2, 4, 0),
    Way(2, 1, 1),
    Way(2, 2, 2),
    Way(2, 1, 3),
    Way(2, 2, 2, is_offloaded=True),
    Way(2, 2, 3, "sgd"),
    Way(2, 4, 2, tensor_parallel_size=2),
    Way(4, 2, 0),
    Way(4, 1, 3),
    Way(4, 1, 2, "sgd"),
    *(Way(4, 2, stage, tensor_parallel_size=2) for stage in range(4)),
    *(Way(4, 4, stage, tensor_parallel_size=4) for stage in (0, 3)),
]
"""tools/benchmarks/invariance.py tests the whole table, for 20 steps."""


@pytest.fixture(scope="module")
def folder(run_ranks, memory_folder):
    make_inputs(memory_folder)
    for world_size in sorted({way.world_size for way in TRIED}):
        run_ranks(world_size, run_ways, memory_folder, [way for way in TRIED if way.world_size == world_size], STEPS)
    return memory_folder


@pytest.fixture(scope="module")
def measured(folder):
    return {outcome.way.name: outcome for outcome in outcomes(folder, tuple(TRIED), STEPS)}


@pytest.mark.parametrize("way", [way.name for way in TRIED])
def test_losses_and_weights_do_not_depend_on_the_cut(measured, way):
    outcome = measured[way]
    assert outcome.loss_difference <= 1e-5
    assert outcome.norm_difference <= 1e-5
    assert outcome.weight_difference <= 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_is_compared_has_trained(folder, optimizer):
    """Weights changed by far more than the tolerance."""
    weights = weights_of(folder, REFERENCES[optimizer, "fp32"].name, STEPS)
    untrained = load_language_model(str(folder / "model")).state_dict()
    moved = [(weights[name] - untrained[name]).abs().max() for name in weights]
    assert max(moved) > 10 * TOLERANCE


@pytest.mark.parametrize("ways", [pytest.param(EXACT, id="the page"), pytest.param(TRIED, id="tried here")])
def test_the_promise_is_the_one_made(ways):
    assert (TOLERANCE, LEARNING_RATE) == (1e-5, 1e-3)
    assert {*ways} <= {*WAYS}
    assert {way.world_size for way in ways} == {1, 2, 4}
    assert {way.zero_stage for way in ways} == {0, 1, 2, 3}
    assert {way.optimizer for way in ways} == {"adamw", "sgd"}
    assert {way.tensor_parallel_size for way in ways} == {0, 1, 2, 4}
    assert any(way.is_offloaded for way in ways)
    # ZeRO shards over data ranks: 4 ranks of which 2 share a model have 2.
    shared = [way for way in ways if way.world_size > way.tensor_parallel_size == 2]
    assert {way.zero_stage for way in shared} == {0, 1, 2, 3}


def test_the_page_has_every_stage_on_every_number_of_tensor_parallel_ranks():
    for size in (2, 4):
        assert {way.zero_stage for way in EXACT if way.tensor_parallel_size == size} == {0, 1, 2, 3}
