import json
import math
import random

import pytest

from megaft.config import GuardConfig
from megaft.guard import Guard, robust_deviation


def guard(state=None, smallest_loss_scale=None, **settings):
    config = GuardConfig(**{"spike_window": 8, **settings})
    return Guard(config, state or {}, smallest_loss_scale=smallest_loss_scale)


def row(step, loss=3.0, grad_norm: float | None = 1.0, skipped_steps=0, **more):
    return {"step": step, "loss": loss, "grad_norm": grad_norm, "skipped_steps": skipped_steps, **more}


def events(watcher, rows):
    return [(t.event, t.step, t.decision) for t in watcher.judge(rows)]


CALM = [row(step, 3.0 + 0.01 * (step % 3), 1.0 + 0.02 * (step % 2)) for step in range(1, 9)]


@pytest.mark.parametrize(
    ("settings", "bad", "expected"),
    [
        ({}, row(9), None),
        ({}, row(9, loss=math.nan), ("non-finite loss", "stop")),
        ({"non_finite": "rewind"}, row(9, loss=math.inf), ("non-finite loss", "rewind")),
        ({"non_finite": "skip"}, row(9, grad_norm=math.inf), ("non-finite gradient", "skip")),
        ({}, row(9, grad_norm=None), ("non-finite gradient", "stop")),
        ({}, row(9, skipped_steps=1), ("non-finite gradient", "stop")),
        ({}, row(9, loss=30.0), None),
        ({"spike": "rewind"}, row(9, loss=30.0), ("loss spike", "rewind")),
        ({"spike": "stop"}, row(9, grad_norm=9.0), ("gradient norm spike", "stop")),
        ({"spike": "stop"}, row(9, loss=0.1, grad_norm=0.1), None),
        ({"spike": "stop", "spike_deviations": 2000.0}, row(9, loss=30.0), None),
        ({"spike": "stop"}, row(9, loss=3.2), None),  # 0.2 above 3.01 is within 8 times a hundredth of it
        ({"spike": "stop"}, row(9, loss=3.3), ("loss spike", "stop")),
    ],
)
def test_a_step_is_judged_by_its_numbers(settings, bad, expected):
    watcher = guard(**settings)
    assert events(watcher, CALM) == []
    assert events(watcher, [bad]) == ([] if expected is None else [(expected[0], 9, expected[1])])


def test_no_spike_is_seen_before_a_quarter_of_the_window():
    watcher = guard(spike="stop")
    assert events(watcher, [row(1), row(2, loss=99.0)]) == []
    assert events(watcher, [row(3), row(4, loss=999.0)]) == [("loss spike", 4, "stop")]


def test_too_many_skips_in_a_row_stop():
    watcher = guard(non_finite="skip", max_skips=2)
    bad = [row(step, loss=math.nan) for step in (1, 2)]
    assert [decision for *_, decision in events(watcher, [*bad, row(3), *bad])] == ["skip"] * 4
    assert events(watcher, [row(6, loss=math.nan)]) == [("non-finite loss", 6, "stop")]


def test_a_spike_does_not_become_the_measure_of_the_next():
    watcher = guard(spike="skip", max_skips=99)
    assert events(watcher, [*CALM, *(row(step, loss=30.0) for step in range(9, 30))]) == [
        ("loss spike", step, "skip") for step in range(9, 30)
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
        assert watcher.wants(calm["step"], calm["loss"], calm["grad_norm"])
    assert watcher.judge(CALM[:-1]) == []
    assert not watcher.wants(9, 30.0, 1.0)
    assert events(watcher, [CALM[-1]]) == [("loss spike", 9, "skip")]
    assert watcher.judge([row(9, loss=30.0, skipped_steps=1)]) == []
    assert watcher.wants(10, 3.0, 1.0)
    assert watcher.judge([row(10, skipped_steps=1)]) == []


def test_nothing_after_a_step_that_rewinds_is_judged():
    assert events(guard(non_finite="rewind"), [row(1, loss=math.nan), row(2, loss=math.nan)]) == [
        ("non-finite loss", 1, "rewind")
    ]


def test_a_resumed_guard_decides_the_same():
    rng = random.Random(0)
    rows = [row(step, 3 + (step % 17 == 0) + rng.gauss(0, 0.05), rng.gauss(2, 0.1)) for step in range(1, 99)]
    whole = events(guard(spike="skip"), rows)
    assert len(whole) > 2
    for cut in (1, 16, 17, 50):
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
