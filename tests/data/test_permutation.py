import pytest

from megaft.data.permutation import permute


@pytest.mark.parametrize("length", [1, 2, 3, 7, 64, 100, 1000, 4097])
def test_every_index_appears_once(length):
    assert sorted(permute(i, length, "key") for i in range(length)) == list(range(length))


def test_the_order_is_pinned():
    """A change of the shuffle would change every resumed run."""
    assert [permute(i, 10, 0, "corpus", 0) for i in range(10)] == [8, 5, 4, 7, 6, 9, 1, 0, 3, 2]


def test_another_key_gives_another_order():
    orders = {tuple(permute(i, 50, seed) for i in range(50)) for seed in range(100)}
    assert len(orders) == 100


def test_places_are_spread_evenly():
    """Over many keys index 0 lands everywhere about equally often: chi-squared of 10 cells, 3,000 draws."""
    counts = [0] * 10
    for seed in range(3000):
        counts[permute(0, 10, seed)] += 1
    assert sum((count - 300) ** 2 / 300 for count in counts) < 27.9  # the 0.1 % point of 9 degrees of freedom


def test_neighbors_part():
    """Neighbors are as far apart as two random positions: a third of the length on average."""
    length = 10_000
    gaps = [abs(permute(i, length, 7) - permute(i + 1, length, 7)) for i in range(2000)]
    assert 0.30 < sum(gaps) / len(gaps) / length < 0.37
