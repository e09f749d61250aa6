import numpy as np
import pytest

from evaluate_zero_shot.evaluation.finished import FinishedBatches
from megaft.base.errors import ConfigError


def values(number, num_quantities=1):
    return np.arange(num_quantities * 5, dtype=np.float32).reshape(num_quantities, 5) + number / 3


@pytest.fixture
def folder(tmp_path):
    """Two ranks' results: batches 0 and 2, 1 and 3."""
    for rank in range(2):
        kept = FinishedBatches(tmp_path / "windows", rank)
        for number in (rank, rank + 2):
            kept.keep(number, values(number, num_quantities=2))
    return tmp_path / "windows"


def test_what_all_ranks_kept_comes_back_to_the_last_bit(folder):
    finished = FinishedBatches(folder, 0).finished
    assert sorted(finished) == [0, 1, 2, 3]
    for number, found in finished.items():
        assert np.array_equal(found, values(number, num_quantities=2))


@pytest.mark.parametrize("end", range(1, 56, 6))
def test_a_record_cut_off_by_a_kill_is_left_out(folder, end):
    path = min(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-end])
    assert sorted(FinishedBatches(folder, 0).finished) == [0, 1, 3]


def test_every_flipped_byte_is_noticed(folder):
    path = min(folder.iterdir())
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        finished = FinishedBatches(folder, 0).finished
        assert sorted(finished) in ([0, 1, 3], [1, 3]), at  # without the record, and what follows it in its file


def test_what_is_kept_after_a_kill_is_added(folder):
    path = min(folder.iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    FinishedBatches(folder, 0).keep(2, values(2))
    assert sorted(FinishedBatches(folder, 0).finished) == [0, 1, 2, 3]


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        FinishedBatches(tmp_path / "file" / "windows", 0)
