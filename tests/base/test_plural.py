"""Numbers of things in messages."""

import pytest

from megaft.base.plural import counted


@pytest.mark.parametrize(("number", "expected"), [(0, "0 ranks"), (1, "1 rank"), (2, "2 ranks"), (1200, "1,200 ranks")])
def test_counted(number, expected):
    assert counted(number, "rank") == expected


def test_another_plural():
    assert [counted(number, "process", "processes") for number in (1, 2)] == ["1 process", "2 processes"]
