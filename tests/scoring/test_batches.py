"""Windows of documents, and batches of windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaft.base.errors import ConfigError
from megaft.scoring.score import Row, batches_of, rounded_length
from megaft.scoring.windows import Window, windows


@pytest.mark.parametrize(
    ("num_tokens", "stride", "expected"),  # expected: (begin, scored_from, end)
    [
        pytest.param(0, 4, [], id="nothing"),
        pytest.param(1, 4, [], id="one token predicts nothing"),
        pytest.param(2, 4, [(0, 1, 2)], id="one target"),
        pytest.param(5, 4, [(0, 1, 5)], id="exactly one window"),
        pytest.param(6, 4, [(0, 1, 5), (1, 5, 6)], id="last window reaches back to the full context"),
        pytest.param(9, 4, [(0, 1, 5), (4, 5, 9)], id="stride = context, full last window"),
        pytest.param(8, 2, [(0, 1, 5), (2, 5, 7), (3, 7, 8)], id="overlap, short last window"),
        pytest.param(7, 1, [(0, 1, 5), (1, 5, 6), (2, 6, 7)], id="one token at a time"),
    ],
)
def test_windows(num_tokens, stride, expected):
    assert list(windows(num_tokens, 4, stride)) == expected


@pytest.mark.parametrize(
    ("stride", "expected"), [(1024, 264), (512, 527), (256, 1053), (128, 2105), (32, 8417)]
)  # hand arithmetic: 1 + ceil((T - 1 - L) / s), T = WikiText-103 test in GPT-2 BPE
def test_number_of_windows(stride, expected):
    assert sum(1 for _ in windows(270_329, 1024, stride)) == expected


@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_every_token_but_the_first_is_scored_once(num_tokens, context_length, data):
    stride = data.draw(st.integers(1, context_length))
    cut = list(windows(num_tokens, context_length, stride))
    assert [p for w in cut for p in range(w.scored_from, w.end)] == list(range(1, num_tokens))
    assert all(0 <= w.begin < w.scored_from < w.end and w.end - 1 - w.begin <= context_length for w in cut)
    assert all(w.end - 1 - w.begin == context_length for w in cut[1:])


@pytest.mark.parametrize(
    ("num_tokens", "stride", "first", "expected"),  # expected: (begin, scored_from, end)
    [
        pytest.param(8, 2, "full", [(0, 1, 5), (2, 5, 7), (4, 7, 8)], id="Megatron: the last window keeps its place"),
        pytest.param(8, 2, "stride", [(0, 1, 3), (0, 3, 5), (2, 5, 7), (4, 7, 8)], id="fairseq: the first one too"),
        pytest.param(11, 5, "full", [(0, 1, 5), (5, 6, 10)], id="chunks: token 5 is not scored, 10 is alone"),
        pytest.param(12, 5, "full", [(0, 1, 5), (5, 6, 10), (10, 11, 12)], id="chunks, short last one"),
    ],
)
def test_other_systems_windows(num_tokens, stride, first, expected):
    assert list(windows(num_tokens, 4, stride, first=first, last="short")) == expected


@pytest.mark.parametrize(("stride", "last", "largest"), [(0, "extended", 4), (5, "extended", 4), (6, "short", 5)])
def test_a_stride_that_skips_tokens_is_refused(stride, last, largest):
    with pytest.raises(ConfigError, match=f"stride is {stride}; use 1 to {largest}"):
        list(windows(10, 4, stride, last=last))


@pytest.mark.slow
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1), st.integers(1, 100))
def test_batches_hold_every_row_once(device_type, sizes, tokens_per_batch):
    rows = [Row(i, Window(0, max(1, inputs - targets), inputs + 1)) for i, (inputs, targets) in enumerate(sizes)]
    batches = batches_of(rows, tokens_per_batch, device_type)
    assert sorted(row for batch in batches for row in batch.rows) == sorted(rows)
    for batch in batches:
        assert len(batch.rows) == 1 or len(batch.rows) * batch.num_columns <= tokens_per_batch
        assert batch.num_columns >= max(row.num_inputs for row in batch.rows)
        targets = [row.num_targets for row in batch.rows]
        assert max(targets) < 2 * min(targets)


@pytest.mark.parametrize(("stride", "tokens_per_batch"), [(512, 8192), (1024, 8192), (32, 65536)])
def test_many_documents_make_few_shapes_on_a_gpu(stride, tokens_per_batch):
    """cuDNN plans each new shape."""
    lengths = np.random.default_rng(0).lognormal(6.5, 0.6, 1000).astype(int)  # as of film reviews: median 665
    offsets = np.cumsum([0, *lengths]).tolist()
    rows = [Row(begin, w) for begin, n in zip(offsets, lengths, strict=False) for w in windows(int(n), 1024, stride)]
    exact, rounded = (batches_of(rows, tokens_per_batch, device_type) for device_type in ("cpu", "cuda"))
    assert len({(len(batch.rows), batch.num_columns) for batch in rounded}) <= 32
    computed = [sum(len(batch.rows) * batch.num_columns for batch in batches) for batches in (exact, rounded)]
    assert computed[1] <= 1.02 * computed[0]
    assert max(batch.num_columns for batch in rounded) == 1024


def test_lengths_are_rounded_to_eight_between_powers_of_two():
    found = [rounded_length(length) for length in range(1, 2049)]
    assert sorted({*found})[-24:] == [*range(288, 512, 32), *range(512, 1024, 64), *range(1024, 2049, 128)]
    assert all(length <= padded < length + max(8, length / 8) for length, padded in enumerate(found, 1))


def test_rounding_up_exceeds_neither_the_longest_row_nor_the_rope_limit():
    rows = [Row(0, Window(0, 1, length + 1)) for length in (100, 70, 61)]
    assert [batch.num_columns for batch in batches_of(rows, 64, "cuda")] == [100, 72, 64]
    assert [batch.num_columns for batch in batches_of(rows, 64, "cuda", rope_length_limit=70)] == [100, 70, 64]
