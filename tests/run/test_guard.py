import json
import math
import random

import pytest

from megaft.base.errors import ConfigError
from megaft.config.train import GuardConfig
from megaft.run.guard import Guard, robust_deviation


def guard(state=None, smallest_loss_scale=None, **settings):
    config = GuardConfig(**{"spike_window": 32, **settings})
    return Guard(config, state or {}, smallest_loss_scale=smallest_loss_scale)


def row(step, loss=3.0, grad_norm: float | None = 1.0, skipped_steps=0, **more):
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "skipped_steps": skipped_steps, **more}


def events(watcher, rows):
    return [(t.event, t.step, t.decision) for t in watcher.judge(rows)]


NUM_CALM = 32
CALM = [row(step, 3.0 + 0.01 * (step % 3), 1.0 + 0.02 * (step % 2)) for step in range(1, NUM_CALM + 1)]
NEXT = NUM_CALM + 1


@pytest.mark.parametrize(
    ("settings", "bad", "expected"),
    [
        ({}, row(NEXT), None),
        ({}, row(NEXT, loss=math.nan), ("non-finite loss", "stop")),
        ({"non_finite": "rewind"}, row(NEXT, loss=math.inf), ("non-finite loss", "rewind")),
        ({"non_finite": "skip"}, row(NEXT, grad_norm=math.inf), ("non-finite gradient", "skip")),
        ({}, row(NEXT, grad_norm=None), ("non-finite gradient", "stop")),
        ({}, row(NEXT, skipped_steps=1), ("non-finite gradient", "stop")),
        ({}, row(NEXT, loss=30.0), None),
        ({"spike": "rewind"}, row(NEXT, loss=30.0), ("loss spike", "rewind")),
        ({"spike": "stop"}, row(NEXT, grad_norm=9.0), ("gradient norm spike", "stop")),
        ({"spike": "stop"}, row(NEXT, loss=0.1, grad_norm=0.1), None),
        ({"spike": "stop", "spike_deviations": 2000.0}, row(NEXT, loss=30.0), None),
        ({"spike": "stop"}, row(NEXT, loss=3.2), None),  # 0.2 above 3.01 is within 8 times a hundredth of it
        ({"spike": "stop"}, row(NEXT, loss=3.3), ("loss spike", "stop")),
    ],
)
def test_a_step_is_judged_by_its_numbers(settings, bad, expected):
    watcher = guard(**settings)
    assert events(watcher, CALM) == []
    assert events(watcher, [bad]) == ([] if expected is None else [(expected[0], NEXT, expected[1])])


@pytest.mark.parametrize(("window", "fewest"), [(32, 32), (128, 32), (400, 100)])
def test_no_spike_is_seen_before_there_are_enough_values(window, fewest):
    """The loss of step 3 and the gradient of the last step but one would be spikes later."""
    rows = [row(step, 3.0 + (step % 2) / 100) for step in range(1, fewest + 1)]
    rows[2] = row(3, loss=4.0)
    rows[fewest - 2] = row(fewest - 1, grad_norm=90.0)
    watcher = guard(spike="stop", spike_window=window)
    assert events(watcher, rows) == []
    assert events(watcher, [row(fewest + 1, loss=4.0)]) == [("loss spike", fewest + 1, "stop")]


def test_noise_is_no_spike():
    """200 runs of 100 steps with normal noise; where two values are enough, 40 of them are stopped."""
    rng = random.Random(0)
    runs = [[row(step, rng.gauss(2, 0.2), rng.gauss(1, 0.1)) for step in range(1, 101)] for _ in range(200)]
    assert [events(guard(spike="stop", spike_window=128), rows) for rows in runs] == [[]] * 200


@pytest.mark.parametrize("window", [8, 31])
def test_a_window_too_short_for_a_deviation_is_refused(window):
    with pytest.raises(ConfigError, match=rf"guard\.spike-window is {window}; use 32 or more, for example 128"):
        GuardConfig(spike_window=window)


def test_too_many_skips_in_a_row_stop():
    watcher = guard(non_finite="skip", max_skips=2)
    bad = [row(step, loss=math.nan) for step in (1, 2)]
    assert [decision for *_, decision in events(watcher, [*bad, row(3), *bad])] == ["skip"] * 4
    assert events(watcher, [row(6, loss=math.nan)]) == [("non-finite loss", 6, "stop")]


def test_a_spike_does_not_become_the_measure_of_the_next():
    watcher = guard(spike="skip", max_skips=99)
    assert events(watcher, [*CALM, *(row(step, loss=30.0) for step in range(NEXT, NEXT + 21))]) == [
        ("loss spike", step, "skip") for step in range(NEXT, NEXT + 21)
    ]


def test_overflows_of_fp16_are_counted_in_a_row():
    watcher = guard(smallest_loss_scale=1.0, max_overflows=3)
    rows = [row(1, grad_norm=math.inf, skipped_steps=1), row(2, skipped_steps=1)]
    rows += [row(step, grad_norm=math.inf, skipped_steps=step - 1) for step in (3, 4)]
    assert events(watcher, rows) == []
    assert events(watcher, [row(5, grad_norm=math.inf, skipped_steps=4)]) == [("overflow streak", 5, "stop")]


def test_an_overflow_at_the_smallest_loss_scale_stops():
    watcher = guard(smallest_loss_scale=1.0)
    assert events(watcher, [row(1, loss_scale=2.0, skipped_steps=1), row(2, loss_scale=1.0, skipped_steps=1)]) == []
    assert events(watcher, [row(3, loss_scale=1.0, skipped_steps=2)]) == [
        ("overflow at the smallest loss scale", 3, "stop")
    ]


def test_a_step_judged_before_its_weights_move_is_not_judged_again():
    """Rows come a step late on a GPU."""
    watcher = guard(spike="skip")
    for calm in CALM:
        assert watcher.accepts(calm["step"], calm["loss"], calm["grad_norm"])
    assert watcher.judge(CALM[:-1]) == []
    assert not watcher.accepts(NEXT, 30.0, 1.0)
    assert events(watcher, [CALM[-1]]) == [("loss spike", NEXT, "skip")]
    assert watcher.judge([row(NEXT, loss=30.0, skipped_steps=1)]) == []
    assert watcher.accepts(NEXT + 1, 3.0, 1.0)
    assert watcher.judge([row(NEXT + 1, skipped_steps=1)]) == []


def test_nothing_after_a_step_that_rewinds_is_judged():
    assert events(guard(non_finite="rewind"), [row(1, loss=math.nan), row(2, loss=math.nan)]) == [
        ("non-finite loss", 1, "rewind")
    ]


def test_a_resumed_guard_decides_the_same():
    rng = random.Random(0)
    rows = [row(step, 3 + (step % 17 == 0) + rng.gauss(0, 0.05), rng.gauss(2, 0.1)) for step in range(1, 99)]
    whole = events(guard(spike="skip"), rows)
    assert len(whole) > 2
    for cut in (1, 33, 34, 50):
        first = guard(spike="skip")
        found = events(first, rows[:cut])
        state = json.loads(json.dumps(first.state()))
        assert found + events(guard(state, spike="skip"), rows[cut:]) == whole


def test_robust_deviation():
    rng = random.Random(1)
    values = [rng.gauss(0, 2) for _ in range(20_000)]
    assert robust_deviation(values) == pytest.approx(2, rel=0.03)
    assert robust_deviation([*values, *[1e9] * 100]) == pytest.approx(2, rel=0.03)
    assert robust_deviation([5.0] * 9) == pytest.approx(0.05)
