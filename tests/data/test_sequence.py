import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_files import IGNORED, cut_documents, document_lengths, reusing_folder, write_dataset

from megaft.base.errors import ConfigError
from megaft.data.batches import PADDED_TO, BatchSplit, collate, micro_batches
from megaft.data.dataset import Dataset
from megaft.data.samples import DocumentSamples, PackedSamples, Sample
from megaft.data.sequence import BLOCK, Samples


@dataclass
class Numbers:
    """A corpus whose sample i is the single token i."""

    sha256: str
    length: int
    num_unscored_samples: int = 0

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return Sample(*(np.array([index]) for _ in range(3)))


def dataset(*arguments):
    return Dataset(write_dataset(*arguments))


def seen(samples, positions):
    """Return the corpus and sample at each position."""
    return [(samples.locate(p)[0], int(samples[p].input_ids[0])) for p in positions]


def scored_labels(corpus):
    return [int(label) for i in range(len(corpus)) for label in corpus[i].labels if label != IGNORED]


# The order of samples

ORDER_OF_SEVEN = [0, 5, 6, 3, 1, 2, 4, 5, 4, 1, 0, 3, 2, 6]
BLEND_OF_TWO = "aabaaaaaaaaaabbabaabaaaaaabaaababbaaabaaabaaaaaaaabaaaaabbaabbaa"


def test_the_order_is_pinned():
    """A change here would change every resumed run: two epochs of seven samples, then a blend."""
    alone = Samples([Numbers("a", 7)], [1.0], seed=0)
    assert [sample for _, sample in seen(alone, range(14))] == ORDER_OF_SEVEN
    blend = Samples([Numbers("a", 7), Numbers("b", 5)], [0.75, 0.25], seed=0)
    assert "".join("ab"[corpus] for corpus, _ in seen(blend, range(64))) == BLEND_OF_TWO
    assert BLEND_OF_TWO.count("b") == 16


@pytest.mark.parametrize("length", [1, 2, 13, 100])
def test_an_epoch_has_each_sample_once(length):
    samples = Samples([Numbers("a", length)], [0.3], seed=5)
    for epoch in range(3):
        numbers = [number for _, number in seen(samples, range(epoch * length, (epoch + 1) * length))]
        assert sorted(numbers) == list(range(length))


def test_epochs_seeds_and_corpora_have_orders_of_their_own():
    def order(seed=0, name="a", epoch=0):
        return tuple(seen(Samples([Numbers(name, 50)], [1], seed), range(epoch * 50, epoch * 50 + 50)))

    orders = [order(), order(seed=1), order(name="b"), order(epoch=1), order(epoch=2)]
    assert len(set(orders)) == len(orders)
    assert order() == order()


WEIGHTS = [
    pytest.param([1.0], id="one corpus"),
    pytest.param([0.7, 0.3], id="two"),
    pytest.param([1 / 3] * 3, id="thirds"),
    pytest.param([1.0, 1e-3], id="a grain"),
    pytest.param([0.3, 1e-3, 0.699], id="a grain in between"),
    pytest.param([1e-3] * 8 + [1], id="many grains"),
    pytest.param([3, 2, 2], id="weights that do not add up to one"),
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_blend_keeps_its_weights(weights):
    samples = Samples([Numbers(str(i), 10) for i in range(len(weights))], weights, seed=1)
    drawn = Counter()
    for position in range(60 * BLOCK):
        drawn[samples.locate(position)[0]] += 1
        if (position + 1) % BLOCK == 0:
            exact = [Fraction(weight) / sum(map(Fraction, weights)) * (position + 1) for weight in weights]
            assert max(abs(drawn[i] - share) for i, share in enumerate(exact)) < 1


@given(weights=st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_locate_counts(weights, seed):
    """Counts computed from the position alone equal those of a loop from position 0."""
    samples = Samples([Numbers(str(i), 10) for i in range(len(weights))], weights, seed)
    drawn = Counter()
    for position in range(6 * BLOCK):
        corpus, number = samples.locate(position)
        assert number == drawn[corpus]
        drawn[corpus] += 1
    assert samples.taken(6 * BLOCK) == [drawn[corpus] for corpus in range(len(weights))]


def test_a_blend_does_not_come_in_runs():
    """With two equal corpora, the longest run in 64 shuffled blocks is as short as for coin tosses."""
    samples = Samples([Numbers("a", 10), Numbers("b", 10)], [1, 1], seed=0)
    corpora = "".join(str(samples.locate(p)[0]) for p in range(64 * BLOCK))
    assert "0" * 25 not in corpora
    assert "1" * 25 not in corpora


def test_every_corpus_of_a_blend_is_seen_in_epochs():
    samples = Samples([Numbers("a", 9), Numbers("b", 4)], [0.9, 0.1], seed=3)
    drawn = seen(samples, range(10 * BLOCK))
    for corpus, length in enumerate([9, 4]):
        order = [sample for chosen, sample in drawn if chosen == corpus]
        assert len(order) > 10 * length
        for begin in range(0, len(order) - length, length):
            assert sorted(order[begin : begin + length]) == list(range(length))


def test_a_corpus_without_samples_is_refused():
    with pytest.raises(ConfigError, match="token to predict"):
        Samples([Numbers("a", 3), Numbers("b", 0)], [1, 1], seed=0)


@pytest.mark.parametrize(
    ("epochs", "global_batch_size", "expected"),
    [(1, 4, 3), (2, 4, 5), (0.5, 4, 2), (0.01, 4, 1), (1, 10, 1), (1, 3, 4)],
)
def test_epochs_in_steps(epochs, global_batch_size, expected):
    assert Samples([Numbers("a", 6), Numbers("b", 4)], [9, 1], seed=0).num_steps(epochs, global_batch_size) == expected


def test_the_identity_of_an_order_tells_corpora_weights_and_lengths_apart():
    def identity(corpora, weights):
        return Samples(corpora, weights, seed=0).fingerprint

    a, b = Numbers("a", 6), Numbers("b", 6)
    others = [
        identity([a], [1]),
        identity([b], [1]),
        identity([Numbers("a", 7)], [1]),
        identity([a, b], [1, 1]),
        identity([b, a], [1, 1]),
        identity([a, b], [1, 2]),
    ]
    assert len(set(others)) == len(others)
    assert identity([a, b], [1, 2]) == identity([a, b], [2, 4])


# How a step is cut


@pytest.mark.parametrize("step", [0, 1, 7])
@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation", "num_ranks"),
    [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)],
)
def test_a_step_is_the_same_samples_in_every_cut(step, micro_batch_size, accumulation, num_ranks):
    cuts = [BatchSplit(micro_batch_size, accumulation, rank, num_ranks) for rank in range(num_ranks)]
    assert {cut.global_batch_size for cut in cuts} == {8}
    assert {len(cut.first_positions(step * 8)) for cut in cuts} == {accumulation}
    positions = [
        first + row for cut in cuts for first in cut.first_positions(step * 8) for row in range(micro_batch_size)
    ]
    assert sorted(positions) == list(range(step * 8, (step + 1) * 8))


def test_one_micro_batch_size_gives_the_same_pieces_on_any_number_of_ranks():
    """Micro-batches are the same on any number of ranks, and so is dropout, which their first position seeds."""
    pieces = [
        sorted(p for rank in range(ranks) for p in BatchSplit(2, 8 // ranks, rank, ranks).first_positions(24))
        for ranks in (1, 2, 4, 8)
    ]
    assert all(other == pieces[0] for other in pieces)


def test_micro_batches_are_the_samples_of_their_positions(tmp_path):
    corpus = PackedSamples(dataset(tmp_path / "a", cut_documents([40, 3])), 4)
    samples = Samples([corpus], [1], seed=2)
    first, second = micro_batches(samples, 8, (), BatchSplit(2, 2, 1, 2), row_length=4)
    assert (first.first_position, second.first_position) == (10, 14)
    for batch in (first, second):
        assert batch.document_ids is None
        for row in range(2):
            sample = samples[batch.first_position + row]
            assert batch.input_ids[row, : len(sample.input_ids)].tolist() == sample.input_ids.tolist()
            assert batch.labels[row, : len(sample.labels)].tolist() == sample.labels.tolist()


def test_what_is_left_out_makes_room_for_the_samples_after_it(tmp_path):
    samples = Samples([PackedSamples(dataset(tmp_path / "a", cut_documents([60])), 4)], [1], seed=2)

    def seen(left_out):
        batches = [micro_batches(samples, step * 2, left_out, BatchSplit(2, 1, 0, 1), 4)[0] for step in range(5)]
        return [row.tolist() for batch in batches for row in batch.input_ids], [b.first_position for b in batches]

    (whole, _), (rest, first_positions) = seen(()), seen(((2, 4), (5, 6)))
    assert rest[:2] == whole[:2]
    assert rest[2:7] == [whole[4], *whole[6:]]
    assert first_positions == [0, 4, 7, 9, 11]  # what dropout is keyed by


# A stream of tokens


@pytest.mark.parametrize(
    ("num_tokens", "expected"),  # (inputs, labels) of each sample of 4 tokens
    [
        pytest.param(1, [], id="one token predicts nothing"),
        pytest.param(2, [([1], [2])], id="one label"),
        pytest.param(5, [([1, 2, 3, 4], [2, 3, 4, 5])], id="exactly one sample"),
        pytest.param(7, [([1, 2, 3, 4], [2, 3, 4, 5]), ([5, 6], [6, 7])], id="a short last sample"),
    ],
)
def test_stream(tmp_path, num_tokens, expected):
    corpus = PackedSamples(dataset(tmp_path / "a", cut_documents([num_tokens])), 4)
    samples = [corpus[i] for i in range(len(corpus))]
    assert [(s.input_ids.tolist(), s.labels.tolist()) for s in samples] == expected


@given(lengths=document_lengths, context_length=st.integers(2, 9))
@reusing_folder
def test_a_stream_has_every_token_but_the_first_as_a_label_once(tmp_path, lengths, context_length):
    corpus = PackedSamples(dataset(tmp_path / "a", cut_documents(lengths)), context_length)
    assert sorted(scored_labels(corpus)) == list(range(2, sum(lengths) + 1))
    for i in range(len(corpus)):
        assert 1 <= len(corpus[i].input_ids) <= context_length
        assert (corpus[i].labels == corpus[i].input_ids + 1).all()  # tokens count up: a label is the next token


def test_only_scored_tokens_are_labels(tmp_path):
    prefix = write_dataset(tmp_path / "a", [[1, 2, 3], [4, 5, 6]], scored=[[0, 1, 1], [0, 0, 1]])
    sample = PackedSamples(Dataset(prefix), 8)[0]
    assert sample.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert sample.labels.tolist() == [2, 3, IGNORED, IGNORED, 6]
    assert [DocumentSamples(Dataset(prefix), 8)[i].labels.tolist() for i in range(2)] == [[2, 3], [IGNORED, 6]]


def test_attention_within_documents(tmp_path):
    corpus = PackedSamples(dataset(tmp_path / "a", cut_documents([3, 0, 1, 5])), 4, attend_within_documents=True)
    samples = [corpus[i] for i in range(len(corpus))]
    assert [s.input_ids.tolist() for s in samples] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    # 1 2 3 | 4 | 5 6 7 8 9: nothing predicts 4 and 5, the first tokens of their documents.
    assert [s.labels.tolist() for s in samples] == [[2, 3, IGNORED, IGNORED], [6, 7, 8, 9]]
    assert [len(set(s.document_ids[:3])) for s in samples] == [1, 1]
    assert [s.document_ids[3] == s.document_ids[0] for s in samples] == [False, True]


@given(lengths=document_lengths, context_length=st.integers(2, 9))
@reusing_folder
def test_within_documents_every_token_but_each_first_is_a_label_once(tmp_path, lengths, context_length):
    documents = cut_documents(lengths)
    corpus = PackedSamples(dataset(tmp_path / "a", documents), context_length, attend_within_documents=True)
    assert sorted(scored_labels(corpus)) == [token for document in documents for token in document[1:]]
    document_of = {token: number for number, document in enumerate(documents) for token in document}
    for i in range(len(corpus)):
        for one, other in pairwise(zip(corpus[i].input_ids, corpus[i].document_ids, strict=True)):
            assert (document_of[one[0]] == document_of[other[0]]) == (one[1] == other[1])


# Samples of one document


@pytest.mark.parametrize(
    ("lengths", "expected"),  # inputs of each sample of 4 tokens
    [
        pytest.param([1, 0, 2], [[2]], id="no sample without a label"),
        pytest.param([5, 3], [[1, 2, 3, 4], [6, 7]], id="one a document"),
        pytest.param([6], [[1, 2, 3, 4], [5]], id="a long document is cut"),
        pytest.param([9, 2], [[1, 2, 3, 4], [5, 6, 7, 8], [10]], id="cut without a rest"),
        pytest.param([1, 1], [], id="nothing to predict"),
    ],
)
def test_documents(tmp_path, lengths, expected):
    corpus = DocumentSamples(dataset(tmp_path / "a", cut_documents(lengths)), 4)
    assert [corpus[i].input_ids.tolist() for i in range(len(corpus))] == expected


@given(lengths=document_lengths, context_length=st.integers(2, 9))
@reusing_folder
def test_documents_have_every_token_but_each_first_as_a_label_once(tmp_path, lengths, context_length):
    documents = cut_documents(lengths)
    corpus = DocumentSamples(dataset(tmp_path / "a", documents), context_length)
    assert scored_labels(corpus) == [token for document in documents for token in document[1:]]
    for i in range(len(corpus)):
        tokens = {*corpus[i].input_ids.tolist(), *corpus[i].labels.tolist()}
        assert len(corpus[i].input_ids) <= context_length
        assert sum(not tokens.isdisjoint(document) for document in documents) == 1


# Batches


def sample_of(*tokens, labels=None):
    tokens = np.array(tokens)
    return Sample(tokens, tokens + 1 if labels is None else np.array(labels), np.zeros_like(tokens))


@pytest.mark.parametrize(
    ("length", "row_length", "expected"),
    [(3, 8, 8), (8, 8, 8), (3, None, PADDED_TO), (64, None, 64), (65, None, 128)],
)
def test_row_lengths(length, row_length, expected):
    batch = collate([sample_of(1), sample_of(*range(length))], 0, row_length, with_document_ids=False)
    assert batch.input_ids.shape == batch.labels.shape == (2, expected)


def test_padding_is_not_scored_and_of_no_document():
    batch = collate([sample_of(5, 6, 7, labels=[6, IGNORED, 8]), sample_of(9)], 40, 4, with_document_ids=True)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0], [9, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, IGNORED, 8, IGNORED], [10, IGNORED, IGNORED, IGNORED]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, -1], [0, -1, -1, -1]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert (batch.num_tokens, batch.num_scored, batch.first_position) == (4, 3, 40)


def test_rows_of_one_document_each_need_no_document_ids():
    rows = [sample_of(5, 6, 7, 8), sample_of(1, 2, 3, 4)]
    assert collate(rows, 0, 4, with_document_ids=True).document_ids is None
    assert collate(rows, 0, 5, with_document_ids=True).document_ids is not None  # padded


def test_a_batch_goes_to_a_device():
    batch = collate([sample_of(1, 2)], 0, 2, with_document_ids=False)
    input_ids, labels, document_ids = batch.to(torch.device("meta"))
    assert (input_ids.device.type, labels.device.type, document_ids) == ("meta", "meta", None)
    assert math.prod(input_ids.shape) == 2
