import math

import numpy as np
import pytest

from evaluate_zero_shot.evaluation import counts, metrics
from evaluate_zero_shot.evaluation.interval import ratio_interval, share_interval
from evaluate_zero_shot.evaluation.limits import is_capped
from evaluate_zero_shot.evaluation.prepared import PreparedTask, TokenText
from evaluate_zero_shot.protocols import PROTOCOLS
from megaft.scoring.score import Score, rows_of
from megaft.scoring.windows import windows


def prepared(documents, context_length=8, stride=8, prefix_id=0, **fields):
    tokens = TokenText(documents)
    cut = rows_of(tokens, lambda n: windows(n, context_length, stride, last="short"), prefix_id=prefix_id)
    counted = {"num_original_tokens": 4, "num_words": 3, "num_bytes": 40, **fields}
    return PreparedTask(detokenizer="identity", tokens=tokens, rows=cut, prefix_id=prefix_id, **counted)


def found(nats, choices=None, num_scored=None):
    nats = np.array(nats, float)
    choices = np.zeros(len(nats), bool) if choices is None else np.array(choices)
    return Score(math.fsum(nats), num_scored or len(nats), 3, 40, nats, choices)


@pytest.mark.parametrize(
    ("protocol", "expected"),  # counted by hand on " a b", "\n  c d "
    [("megaft", 4), ("megatron", 4), ("fairseq", 5), ("ralm", 6), ("lm-eval", 3 + 4)],
)
def test_each_protocol_counts_words_its_own_way(protocol, expected):
    documents = [" a b", "\n  c d "]
    assert counts.word_divisor(PROTOCOLS[protocol], "".join(documents), documents) == expected


def test_megatrons_adjusted_perplexity_by_hand():
    # T = 6 tokens, of which 5 are scored with 2 nats each; T_o = 4: exp(10 / 5 * 5 / 3).
    ours = metrics.metrics(
        found([0, 2, 2, 2, 2, 2], num_scored=5), prepared([[1] * 6], prefix_id=None), PROTOCOLS["megatron"]
    )
    assert ours["word_perplexity"] == pytest.approx(math.exp(10 / 3))
    assert ours["perplexity"] == pytest.approx(math.exp(2))
    assert ours["bits_per_byte"] == pytest.approx(10 / math.log(2) / 40)


def test_megatrons_exponent_ends_at_20_and_others_do_not():
    costly = found([30.0] * 4)
    assert metrics.metrics(costly, prepared([[1] * 4]), PROTOCOLS["megatron"])["perplexity"] == math.exp(20)
    assert metrics.metrics(costly, prepared([[1] * 4]), PROTOCOLS["megaft"])["perplexity"] == pytest.approx(
        math.exp(30)
    )


def test_chunks_stretch_the_mean_to_tokens_that_are_not_scored():
    # Two chunks of three tokens: four are scored, one nat each; T = 6, T_o - 1 = 3: exp(1 * 5 / 3).
    tokens = TokenText([[1] * 6])
    rows = rows_of(tokens, lambda n: windows(n, 2, 3, last="short"))
    assert [row.num_targets for row in rows] == [2, 2]
    item = PreparedTask(
        detokenizer="identity", tokens=tokens, rows=rows, num_original_tokens=4, num_words=3, num_bytes=40
    )
    ours = metrics.metrics(found([0, 1, 1, 0, 1, 1], num_scored=4), item, PROTOCOLS["lm-finetuning"])
    assert ours["word_perplexity"] == pytest.approx(math.exp(5 / 3))


def test_windows_are_weighted_by_their_labels_minus_one():
    # Context 4, stride 2 over 7 tokens: (1 2 3), (4 5), (6); means 1, 2, 4; weights 3, 1, 0.
    tokens = TokenText([[1] * 7])
    rows = rows_of(tokens, lambda n: windows(n, 3, 2, last="short"))
    item = PreparedTask(
        detokenizer="identity", tokens=tokens, rows=rows, num_original_tokens=4, num_words=3, num_bytes=40
    )
    ours = metrics.metrics(found([0, 1, 1, 1, 2, 2, 4], num_scored=6), item, PROTOCOLS["hf-docs"])
    assert ours["perplexity"] == pytest.approx(math.exp((3 * 1 + 1 * 2) / 4))


def test_a_prompt_is_right_when_all_its_target_is():
    item = prepared([[1, 2], [3, 4], [5, 6]], is_prompted=True)
    ours = metrics.metrics(found([1] * 6, [True, True, True, False, False, True]), item, PROTOCOLS["megaft"])
    assert ours["accuracy"] == pytest.approx(1 / 3)
    interval = metrics.interval("accuracy", 1 / 3, found([1] * 6, [True, True, True, False, False, True]), item)
    assert interval["low"] < 1 / 3 < interval["high"]
    assert "3 examples" in interval["method"]


def test_of_questions_the_cheapest_option_is_chosen_and_the_right_one_counted():
    item = prepared([[1], [2], [3], [4]], is_prompted=True, num_options=(2, 2), answers=(0, 0), num_words=None)
    ours = metrics.metrics(found([1, 2, 4, 3]), item, PROTOCOLS["megaft"])
    assert ours["accuracy"] == 0.5  # the first question is right, of the second option 1 is cheaper
    assert (ours["nats"], ours["num_scored_tokens"]) == (5, 2)
    assert ours["word_perplexity"] is None


def test_segments_and_positions_hold_every_nat():
    documents = [[1] * n for n in (5, 11, 3)]
    item, nats = prepared(documents), np.arange(19.0)
    cut = metrics.segments(found(nats), item)
    assert cut["segment_unit"] == "document"
    assert cut["segments"] == [(5, nats[:5].sum()), (11, nats[5:16].sum()), (3, nats[16:].sum())]
    by_position = metrics.positions(found(nats), item.rows, 8)
    assert sum(n for _, n, _ in by_position) == 19
    assert math.fsum(x for *_, x in by_position) == pytest.approx(nats.sum())
    assert by_position[0][:2] == (0, 4)  # one first column in every window: 5, 8 + 3, 3
    alone = metrics.segments(found(np.ones(1000)), prepared([[1] * 1000]))
    assert alone["segment_unit"] == "block"
    assert sum(n for n, _ in alone["segments"]) == 1000


def test_the_interval_of_a_ratio_holds_the_truth_19_times_in_20():
    generator = np.random.default_rng(0)
    words = generator.integers(50, 150, (2000, 60))
    nats = words * 3.5 + generator.normal(0, 40, words.shape)
    hits = [low < 3.5 < high for low, high in map(ratio_interval, nats, words)]
    assert 0.93 < np.mean(hits) < 0.97
    assert ratio_interval([1.0], [1.0]) is None


def test_wilson_by_hand():
    # Wilson 1927: 8 of 10 at 95 %: (0.4902, 0.9433).
    assert share_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert share_interval(0, 10)[0] == pytest.approx(0)


def test_the_interval_of_a_perplexity_is_around_it():
    generator = np.random.default_rng(1)
    item = prepared([[1] * 40 for _ in range(30)], num_words=600, document_words=(20,) * 30)
    score = found(generator.gamma(2, 1, 1200))
    value = metrics.metrics(score, item, PROTOCOLS["megaft"])["word_perplexity"]
    interval = metrics.interval("word_perplexity", value, score, item)
    assert interval["low"] < value < interval["high"] < 2 * value
    assert "30 documents" in interval["method"]


def test_what_is_not_defined_has_no_interval():
    item = prepared([[1] * 6], prefix_id=None, num_words=0)  # one word: Megatron divides by none
    score = found([0, 2, 2, 2, 2, 2], num_scored=5)
    value = metrics.metrics(score, item, PROTOCOLS["megatron"])["word_perplexity"]
    assert value is None
    assert metrics.interval("word_perplexity", value, score, item) is None


def test_a_figure_that_is_a_limit_has_no_interval_and_says_so():
    """Of 30 documents, one word each: e^40 a word is a float, e^800 is none, and Megatron-LM gives e^20 for both."""
    item = prepared([[1] * 40 for _ in range(30)], num_words=30, document_words=(1,) * 30)
    for nats, largest in ((1.0, math.exp(40)), (20.0, math.inf)):
        score = found([nats] * 1200)
        for name, limit in (("megaft", largest), ("megatron", math.exp(20))):
            protocol = PROTOCOLS[name]
            value = metrics.metrics(score, item, protocol)["word_perplexity"]
            assert value == pytest.approx(limit)
            is_limit = is_capped(value, protocol) or value == math.inf
            assert is_limit == (name == "megatron" or nats == 20.0)
            made = metrics.interval("word_perplexity", value, score, item, is_capped(value, protocol))
            assert (made is None) == is_limit
