from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaft.data.left_out import full_position, full_ranges, leave_out

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 5)), max_size=5).map(
    lambda spans: leave_out((), tuple((begin, begin + length) for begin, length in spans))
)


@pytest.mark.parametrize(
    ("left_out", "expected"),  # the first six positions of the whole sequence that are seen
    [
        pytest.param((), [0, 1, 2, 3, 4, 5], id="nothing"),
        pytest.param(((0, 2),), [2, 3, 4, 5, 6, 7], id="the first"),
        pytest.param(((2, 3), (4, 6)), [0, 1, 3, 6, 7, 8], id="two ranges"),
        pytest.param(((9, 12),), [0, 1, 2, 3, 4, 5], id="only later ones"),
    ],
)
def test_full_position(left_out, expected):
    assert [full_position(position, left_out) for position in range(6)] == expected


@given(RANGES)
def test_the_run_sees_every_sample_that_is_not_left_out_in_order(left_out):
    gone = {position for span in left_out for position in range(*span)}
    seen = [full_position(position, left_out) for position in range(60)]
    assert seen == [position for position in range(200) if position not in gone][:60]


@given(RANGES, st.integers(0, 30), st.integers(1, 8))
def test_leaving_out_a_step_gives_its_place_to_the_next(left_out, begin, length):
    gone = full_ranges(begin, begin + length, left_out)
    after = leave_out(left_out, gone)
    assert [full_position(place, after) for place in range(begin)] == [
        full_position(place, left_out) for place in range(begin)
    ]
    assert [full_position(place, after) for place in range(begin, 60)] == [
        full_position(place + length, left_out) for place in range(begin, 60)
    ]
    assert all(one[1] < two[0] for one, two in pairwise(after))  # rising, and joined where they touch
