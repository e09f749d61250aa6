"""Samples without a scored token are left out of training; no scored token is lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_files import IGNORED, cut_documents, document_lengths, reusing_folder, write_dataset

from megaft.data import scored_samples
from megaft.data.dataset import Dataset
from megaft.data.samples import DocumentSamples, PackedSamples
from megaft.data.sequence import Samples


def open_corpus(kind, prefix, context_length):
    if kind == "document":
        return DocumentSamples(Dataset(prefix), context_length)
    return PackedSamples(Dataset(prefix), context_length, attend_within_documents=kind == "within")


def masked(documents, scored):
    """Return the loss mask of the documents' tokens."""
    return [[token in scored for token in document] for document in documents]


@pytest.mark.parametrize(
    ("kind", "scored", "expected", "num_unscored_samples"),  # expected: first and last input of each sample of 4 tokens
    [
        # Documents of 9 and 3 tokens: 1 to 9, and 10 to 12.
        pytest.param("document", {11, 12}, [(10, 11)], 2, id="a prompt longer than the context"),
        pytest.param("document", {9, 12}, [(5, 8), (10, 11)], 1, id="the end of a long document is scored"),
        pytest.param("document", set(), [], 3, id="no completion"),
        pytest.param("document", {1, 10}, [], 3, id="first tokens, which are no labels"),
        pytest.param("stream", {9}, [(5, 8)], 2, id="stream"),
        pytest.param("stream", set(), [], 3, id="stream without a completion"),
        pytest.param("stream", {1}, [], 3, id="the first token of a stream"),
        pytest.param("stream", {10}, [(9, 11)], 2, id="a stream predicts a document's first token"),
        pytest.param("within", {10}, [], 3, id="which attention within documents does not"),
        pytest.param("within", {9}, [(5, 8)], 2, id="attention within documents"),
    ],
)
def test_a_sample_without_a_scored_token_is_left_out(tmp_path, kind, scored, expected, num_unscored_samples):
    documents = cut_documents([9, 3])
    corpus = open_corpus(kind, write_dataset(tmp_path / "a", documents, masked(documents, scored)), 4)
    inputs = [corpus[i].input_ids for i in range(len(corpus))]
    assert [(row[0], row[-1]) for row in inputs] == expected
    assert corpus.num_unscored_samples == num_unscored_samples


def labels_by_hand(kind, documents, context_length):
    if kind == "document":
        return [doc[1:][at : at + context_length] for doc in documents for at in range(0, len(doc) - 1, context_length)]
    tokens = [token for document in documents for token in document]
    firsts = {document[0] for document in documents if document} if kind == "within" else set()
    parts = [tokens[at + 1 : at + 1 + context_length] for at in range(0, len(tokens) - 1, context_length)]
    return [[token for token in part if token not in firsts] for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["document", "stream", "within"])
@given(lengths=document_lengths, context_length=st.integers(1, 9), share=st.sampled_from([0, 0.1, 0.5, 1]))
@reusing_folder
def test_every_sample_holds_a_scored_token_and_none_of_these_is_lost(tmp_path, kind, lengths, context_length, share):
    documents = cut_documents(lengths)
    wanted = np.random.default_rng(sum(lengths)).random(sum(lengths) + 1) < share
    scored = None if share == 1 else masked(documents, set(np.flatnonzero(wanted)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scored_samples, "TOKENS_AT_ONCE", 12)
        corpus = open_corpus(kind, write_dataset(tmp_path / "a", documents, scored), context_length)
    by_hand = [[t for t in part if wanted[t]] for part in labels_by_hand(kind, documents, context_length)]
    labels = [[int(label) for label in corpus[i].labels if label != IGNORED] for i in range(len(corpus))]
    assert labels == [part for part in by_hand if part]
    assert corpus.num_unscored_samples == sum(not part for part in by_hand)


def test_only_a_dataset_with_such_samples_has_another_order_than_before(tmp_path):
    """The run's identity includes the data: a run that included these samples is a different run."""
    documents = cut_documents([9, 3])
    whole = write_dataset(tmp_path / "a", documents, masked(documents, {3, 7, 11}))
    holed = write_dataset(tmp_path / "b", documents, masked(documents, {7, 11}))
    names = [Samples([open_corpus("document", prefix, 4)], [1.0], seed=0).fingerprint for prefix in (whole, holed)]
    assert [name.split(":")[1] for name in names] == ["3", "2"]
