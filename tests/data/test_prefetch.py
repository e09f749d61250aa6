"""Prefetched micro-batches equal those that are built when they are needed."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_files import cut_documents, write_dataset

from megaft.base.errors import DataError
from megaft.data import batches
from megaft.data.batches import BatchSplit, micro_batches
from megaft.data.dataset import Dataset
from megaft.data.prefetch import Prefetch
from megaft.data.samples import PackedSamples
from megaft.data.sequence import Samples

SPLIT, ROW_LENGTH = BatchSplit(micro_batch_size=2, gradient_accumulation_steps=2, rank=1, num_ranks=2), 4
SIZE = SPLIT.global_batch_size


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    corpus = PackedSamples(
        Dataset(write_dataset(tmp_path / "a", cut_documents([60, 7, 40]))), 4, attend_within_documents=True
    )
    return Samples([corpus], [1], seed=2)


def numbers(step):
    """Return everything in a step's batches, as lists."""
    return [
        [None if tensor is None else tensor.tolist() for tensor in batch.to(torch.device("cpu"))]
        + [batch.first_position]
        for batch in step
    ]


def built(samples, position, left_out):
    return numbers(micro_batches(samples, position, left_out, SPLIT, ROW_LENGTH))


def test_batches_are_the_same_over_epochs(samples):
    with Prefetch(samples, SPLIT, ROW_LENGTH) as prefetch:
        for step in range(3, 12):
            assert numbers(prefetch.take(step * SIZE, ())) == built(samples, step * SIZE, ())


def test_a_rewind_discards_what_was_prefetched(samples):
    steps = [(0, ()), (SIZE, ()), (2 * SIZE, ()), (SIZE, ()), (2 * SIZE, ((16, 24),)), (2 * SIZE, ()), (3 * SIZE, ())]
    with Prefetch(samples, SPLIT, ROW_LENGTH) as prefetch:
        for position, left_out in steps:
            assert numbers(prefetch.take(position, left_out)) == built(samples, position, left_out)


def test_the_next_step_is_built_while_this_one_computes(samples, monkeypatch):
    calls, is_built = [], threading.Event()

    def counted(*arguments):
        calls.append((arguments[1], threading.current_thread() is threading.main_thread()))
        if arguments[1] == SIZE:
            is_built.set()
        return micro_batches(*arguments)

    monkeypatch.setattr(batches, "micro_batches", counted)
    with Prefetch(samples, SPLIT, ROW_LENGTH) as prefetch:
        prefetch.take(0, ())
        assert is_built.wait(30)
    assert calls == [(0, False), (SIZE, False)]


def test_an_error_is_raised_by_its_own_step(samples, monkeypatch):
    def fail_at_the_second(samples, position, *rest):
        if position == SIZE:
            raise DataError("token 7 is 99.")
        return micro_batches(samples, position, *rest)

    monkeypatch.setattr(batches, "micro_batches", fail_at_the_second)
    with Prefetch(samples, SPLIT, ROW_LENGTH) as prefetch:
        assert len(prefetch.take(0, ())) == 2
        with pytest.raises(DataError, match="token 7 is 99"):
            prefetch.take(SIZE, ())
        assert numbers(prefetch.take(0, ())) == built(samples, 0, ())  # the thread lives on


def test_an_error_in_a_step_that_is_not_taken_is_not_raised(samples, monkeypatch):
    def fail_at_the_second(samples, position, *rest):
        assert position != SIZE
        return micro_batches(samples, position, *rest)

    monkeypatch.setattr(batches, "micro_batches", fail_at_the_second)
    with Prefetch(samples, SPLIT, ROW_LENGTH) as prefetch:
        prefetch.take(0, ())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_no_thread_is_left(samples, error):
    before = threading.active_count()
    try:
        with Prefetch(samples, SPLIT, ROW_LENGTH) as prefetch:
            prefetch.take(0, ())
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert threading.active_count() == before


def test_scored_labels_are_counted(samples):
    for batch in micro_batches(samples, 0, (), SPLIT, ROW_LENGTH):
        assert batch.num_scored == int(np.count_nonzero(batch.labels.numpy() != -100))
