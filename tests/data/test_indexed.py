import struct
from itertools import pairwise

import numpy as np
import pytest
import torch

from megaft.base.errors import DataError
from megaft.data.indexed import TokenFile, TokenWriter, idx_bytes

DOCUMENTS = [[[1, 2], [3]], [[]], [[4]], [[5, 6, 7]]]  # in pieces


def write(prefix, documents, cardinality):
    writer = TokenWriter(prefix.with_suffix(".bin"), cardinality=cardinality)
    for document in documents:
        for piece in document:
            writer.add(np.array(piece, np.int64))
        writer.end_document()
    writer.close(prefix.with_suffix(".idx"))
    return prefix


@pytest.mark.parametrize(("cardinality", "dtype"), [(None, "uint8"), (65_499, "uint16"), (65_500, "int32")])
def test_both_readers_agree(tmp_path, cardinality, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = write(tmp_path / "a", DOCUMENTS, cardinality)
    ours, theirs = TokenFile(prefix), IndexedDataset(str(prefix))
    assert ours.dtype == np.dtype(theirs.index.dtype) == dtype
    assert (ours.num_documents, ours.num_tokens) == (len(theirs), sum(theirs.sequence_lengths)) == (4, 7)
    assert ours.document_offsets.tolist() == [0, 3, 3, 4, 7]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    for i, (begin, end) in enumerate(pairwise(ours.document_offsets)):
        np.testing.assert_array_equal(ours.read(int(begin), int(end)), theirs[i])
    assert ours.read(2, 6).tolist() == [3, 4, 5, 6]
    assert prefix.with_suffix(".idx").stat().st_size == idx_bytes(4)


@pytest.mark.parametrize(("cardinality", "dtype"), [(None, np.uint8), (65_499, np.uint16), (65_500, np.int32)])
def test_the_files_are_those_of_megatron_core(tmp_path, cardinality, dtype):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    ours, theirs = write(tmp_path / "ours", DOCUMENTS, cardinality), tmp_path / "theirs"
    assert cardinality is None or DType.optimal_dtype(cardinality) is dtype
    builder = IndexedDatasetBuilder(str(theirs.with_suffix(".bin")), dtype)
    for pieces in DOCUMENTS:
        tokens = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64)
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(theirs.with_suffix(".idx")))
    for suffix in (".bin", ".idx"):
        assert ours.with_suffix(suffix).read_bytes() == theirs.with_suffix(suffix).read_bytes()


def test_a_document_longer_than_the_format_can_say(tmp_path):
    writer = TokenWriter(tmp_path / "a.bin", cardinality=9)
    writer._lengths[-1] = 2**31
    with pytest.raises(DataError, match=r"2,147,483,648 tokens; .* --unit"):
        writer.end_document()


def test_no_tokens(tmp_path):
    tokens = TokenFile(write(tmp_path / "a", [[[]]], 9))
    assert (tokens.num_documents, tokens.num_tokens, tokens.read(0, 0).tolist()) == (1, 0, [])


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (3, 2), (0, 8)])
def test_outside_the_stream(tmp_path, begin, end):
    with pytest.raises(IndexError, match="of a stream of 7"):
        TokenFile(write(tmp_path / "a", DOCUMENTS, 9)).read(begin, end)


def overwrite(at, data):
    return lambda old: old[:at] + data + old[at + len(data) :]


DAMAGE = [
    pytest.param(".idx", overwrite(0, b"X"), "not a version 1 Megatron index", id="magic"),
    pytest.param(".idx", overwrite(9, b"\2"), "not a version 1 Megatron index", id="version"),
    pytest.param(".idx", overwrite(17, b"\x09"), "not a version 1 Megatron index", id="dtype code"),
    pytest.param(".idx", overwrite(18, struct.pack("<Q", 2**40)), "document must be one sequence", id="count"),
    pytest.param(".idx", lambda old: old[:-1], "document must be one sequence", id="short index"),
    pytest.param(".idx", lambda old: old[:9], "shorter than its header", id="header only"),
    pytest.param(".bin", lambda old: old[:-1], "has 13 bytes, but .* says 7 tokens of 2 bytes", id="short tokens"),
    pytest.param(".bin", None, "does not exist", id="no tokens"),
    pytest.param(".idx", None, "does not exist", id="no index"),
]


@pytest.mark.parametrize(("suffix", "damage", "message"), DAMAGE)
def test_damage_is_named(tmp_path, suffix, damage, message):
    path = write(tmp_path / "a", DOCUMENTS, 9).with_suffix(suffix)
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(DataError, match=message) as raised:
        TokenFile(tmp_path / "a")
    assert str(path) in str(raised.value)
