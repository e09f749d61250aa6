import itertools
import math
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from megaft.base.errors import DataError, NumericsError
from megaft.data.samples import IGNORE_INDEX
from megaft.models.hugging_face import NatsModel
from megaft.models.loss import token_nats
from megaft.scoring import score as scoring
from megaft.scoring.host_copy import HostCopy
from megaft.scoring.score import Score, rows_of, score
from megaft.scoring.windows import windows

CPU = torch.device("cpu")
PREFIX, EOD = 0, 1


class Text:
    def __init__(self, *documents):
        self.document_offsets = np.array([0, *itertools.accumulate(map(len, documents))])
        self.tokens = np.array([token for document in documents for token in document], np.uint16)

    def read(self, begin, end):
        return self.tokens[begin:end]


class Rank:
    """One of `size` ranks that take turns in one process; the last to run sees the sum."""

    def __init__(self, rank, size, total):
        self.data_parallel_rank, self.data_parallel_size, self.total = lambda: rank, lambda: size, total

        self.is_main, self.tensor_parallel_rank = lambda: rank == 0, lambda: 0

    def sum_over_ranks(self, tensor):
        self.total.append(tensor.clone())
        return torch.stack(self.total).sum(0)

    def broadcast_from_main(self, tensor):
        return tensor


class Model:
    """Model that counts its forward passes and records their shapes."""

    def __init__(self, model):
        self.model, self.shapes = model.eval(), []

    def __call__(self, batch):
        self.shapes.append(tuple(batch.input_ids.shape))
        return token_nats(self.model(batch.input_ids).logits, batch.labels).flatten()[None, batch.positions]


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_embd": 32,
        "n_head": 2,
        "n_positions": 64,
        "vocab_size": 97,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3)).eval()


def tokens(num_tokens, seed=0):
    return np.random.default_rng(seed).integers(2, 97, num_tokens).tolist()


def run(model, text, context_length=64, stride=64, batch_size=2, prefix_id=None, eod_id=None, **settings):
    rows = rows_of(text, lambda n: windows(n, context_length, stride), prefix_id=prefix_id, eod_id=eod_id)
    model = Model(model) if isinstance(model, GPT2LMHeadModel) else model
    size = batch_size * context_length
    return score(text, rows, model, tokens_per_batch=size, device=CPU, prefix_id=prefix_id, **settings)


def test_a_short_document_costs_transformers_own_loss(gpt2):
    document = tokens(50)
    result = run(gpt2, Text(document))
    ids = torch.tensor([document])
    assert result.num_scored_tokens == 49
    assert result.nats == pytest.approx(gpt2(ids, labels=ids).loss.item() * 49, rel=1e-6)
    assert result.token_nats[0] == 0.0


def test_a_prefix_makes_the_first_token_count(gpt2):
    documents = [tokens(20, 1), tokens(1, 2), tokens(30, 3)]
    result = run(gpt2, Text(*documents), prefix_id=PREFIX)
    expected = 0.0
    for document in documents:
        ids = torch.tensor([[PREFIX, *document]])
        expected += gpt2(ids, labels=ids).loss.item() * len(document)
    assert result.num_scored_tokens == 51
    assert result.nats == pytest.approx(expected, rel=1e-6)


def test_a_trailing_eod_is_left_out(gpt2):
    documents = [tokens(20, 1), [], tokens(30, 3)]
    with_eod = run(gpt2, Text(*([*d, EOD] for d in documents)), prefix_id=PREFIX, eod_id=EOD)
    without = run(gpt2, Text(*documents), prefix_id=PREFIX)
    assert with_eod == without
    assert with_eod.num_scored_tokens == 50
    assert run(gpt2, Text([*tokens(20, 1), EOD]), prefix_id=PREFIX).num_scored_tokens == 21


@pytest.mark.parametrize("prefix", [[], [PREFIX]])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_each_token_sees_the_context_of_its_window(gpt2, stride, prefix):
    documents = [tokens(23, 1), tokens(5, 2), tokens(30, 3)]
    expected = []
    for document in documents:
        ids = [*prefix, *document]
        nats = [0.0] * (len(ids) > len(document) or 1)
        for target in range(1, len(ids)):
            # The last position that its window scores decides how far back the context reaches.
            end = 9 if target < 9 else min(len(ids), 9 + math.ceil((target - 8) / stride) * stride)
            context = torch.tensor([ids[max(0, end - 9) : target]])
            nats.append(-gpt2(context).logits[0, -1].double().log_softmax(-1)[ids[target]].item())
        expected += nats[-len(document) :]
    text = Text(*documents)
    result = run(gpt2, text, context_length=8, stride=stride, batch_size=3, prefix_id=prefix[0] if prefix else None)
    assert result.token_nats == pytest.approx(expected, rel=2e-5, abs=1e-5)
    assert result.nats == pytest.approx(math.fsum(expected), rel=1e-6)
    assert result.num_scored_tokens == 58 - 3 * (not prefix)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_ranks_gives_the_same_bits(gpt2, size, monkeypatch):
    text = Text(tokens(100, 1), tokens(3, 2), tokens(45, 3))
    settings = {"context_length": 16, "stride": 5, "prefix_id": PREFIX}
    alone = run(gpt2, text, **settings)
    for last in range(size):  # whichever rank ends last has the whole sum
        total, order = [], [*(r for r in range(size) if r != last), last]
        for rank in order:
            monkeypatch.setattr(scoring, "parallel", Rank(rank, size, total))
            together = run(gpt2, text, **settings)
        assert together.nats.hex() == alone.nats.hex()
        assert np.array_equal(together.token_nats, alone.token_nats)
        assert together == alone


@pytest.mark.parametrize(
    ("num_tokens", "batch_size", "size", "passes"),
    [
        pytest.param(33, 1, 3, 2, id="4 windows on 3 ranks"),
        pytest.param(33, 1, 1, 4, id="4 windows on 1 rank"),
        pytest.param(33, 3, 4, 1, id="2 batches on 4 ranks"),
        pytest.param(41, 2, 2, 2, id="3 batches on 2 ranks"),
    ],
)
def test_ranks_make_equal_numbers_of_passes(gpt2, num_tokens, batch_size, size, passes, monkeypatch):
    for rank in range(size):
        model = Model(gpt2)
        monkeypatch.setattr(scoring, "parallel", Rank(rank, size, []))
        run(model, Text(tokens(num_tokens)), context_length=8, stride=8, batch_size=batch_size)
        assert len(model.shapes) == passes


def test_a_dummy_batch_scores_nothing(monkeypatch):
    seen = []

    def model(batch):
        seen.append(batch.labels.clone())
        return torch.zeros(1, len(batch.positions))

    monkeypatch.setattr(scoring, "parallel", Rank(1, 2, []))
    run(model, Text(tokens(5)), context_length=8, stride=8, batch_size=1)
    assert len(seen) == 1
    assert (seen[0] == IGNORE_INDEX).all()


class Memory:
    """BatchStore in memory that stops the evaluation after a number of batches."""

    def __init__(self, stop_after=None):
        self.finished, self.stop_after = {}, stop_after

    def keep(self, number, values):
        self.finished[number] = values
        if len(self.finished) == self.stop_after:
            raise KeyboardInterrupt


def test_an_interrupted_evaluation_continues_with_the_same_bits(gpt2):
    text, settings = Text(tokens(100, 1), tokens(30, 2)), {"context_length": 16, "stride": 4, "batch_size": 2}
    undisturbed = run(gpt2, text, **settings)
    memory, model, done = Memory(stop_after=5), Model(gpt2), []
    with pytest.raises(KeyboardInterrupt):
        run(model, text, store=memory, **settings)
    memory.stop_after = None
    continued = run(model, text, store=memory, progress=done.append, **settings)
    assert continued.nats.hex() == undisturbed.nats.hex()
    assert len(model.shapes) == len(memory.finished)  # no batch twice
    rows = rows_of(text, lambda n: windows(n, 16, 4))
    assert done[-1] == sum(row.num_inputs for row in rows)


@pytest.mark.parametrize("in_flight", [0, 1])
def test_values_are_read_after_later_batches_are_launched(gpt2, in_flight, monkeypatch):
    """A batch is finished, and kept, when its values are on the host."""
    text, events = Text(tokens(33)), []

    def read_and_mark(copy, read=HostCopy.wait):
        events.append("read")
        return read(copy)

    class Store(Memory):
        def keep(self, number, values):
            events.append(number)
            super().keep(number, values)

    class Launches(Model):
        def __call__(self, batch):
            events.append("launch")
            return super().__call__(batch)

    settings = {"context_length": 8, "stride": 8, "batch_size": 1}
    expected = run(gpt2, text, **settings)
    monkeypatch.setitem(scoring.IN_FLIGHT, "cpu", in_flight)
    monkeypatch.setattr(HostCopy, "wait", read_and_mark)
    store, done = Store(), []
    late = run(Launches(gpt2), text, store=store, progress=done.append, **settings)
    finished = [["read", number] for number in range(4)]
    order = ["launch", *finished[0], "launch", *finished[1], "launch", *finished[2], "launch", *finished[3]]
    if in_flight:
        order = ["launch", "launch", *finished[0], "launch", *finished[1], "launch", *finished[2], *finished[3]]
    assert events == order
    assert done == [0, 8, 16, 24, 32]
    assert late.token_nats.tolist() == expected.token_nats.tolist()
    assert [store.finished[number].tolist() for number in range(4)] == [
        [late.token_nats[8 * number + 1 : 8 * number + 9].tolist()] for number in range(4)
    ]


def test_a_batch_in_flight_is_scored_again_after_an_interruption(gpt2, monkeypatch):
    monkeypatch.setitem(scoring.IN_FLIGHT, "cpu", 1)
    text, settings = Text(tokens(33)), {"context_length": 8, "stride": 8, "batch_size": 1}
    memory, model = Memory(stop_after=2), Model(gpt2)
    with pytest.raises(KeyboardInterrupt):
        run(model, text, store=memory, **settings)
    assert (sorted(memory.finished), len(model.shapes)) == ([0, 1], 3)
    memory.stop_after = None
    continued = run(model, text, store=memory, **settings)
    assert (sorted(memory.finished), len(model.shapes)) == ([0, 1, 2, 3], 5)
    assert continued.nats.hex() == run(gpt2, text, **settings).nats.hex()


BAD_TOKEN = 50


def model_with(value):
    """Return one nat per label, but this value for BAD_TOKEN."""

    def model(batch):
        nats = torch.where(batch.targets == BAD_TOKEN, value, 1.0)
        return torch.stack([nats, torch.zeros_like(nats)])

    return model


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("documents", "said"),
    [
        pytest.param([[2] * 9 + [BAD_TOKEN], [2] * 5], r"1 of 15 .* token 9 of document 0", id="one token"),
        pytest.param([[2] * 9, [BAD_TOKEN] * 5], r"5 of 14 .* token 0 of document 1", id="a document"),
        pytest.param([[2] * 40 + [BAD_TOKEN] + [2] * 40], r"1 of 81 .* token 40 of document 0", id="a later window"),
    ],
)
def test_nats_that_are_not_finite_are_refused(documents, said, value):
    with pytest.raises(NumericsError, match=rf"valid\.txt: {said}.*: {value}\. "):
        run(model_with(value), Text(*documents), context_length=16, stride=4, prefix_id=PREFIX, name="valid.txt")


def test_a_token_that_does_not_count_may_be_infinite():
    """Like a token of a prompt that the model never generates."""
    text = Text([2, BAD_TOKEN, 3, 4])
    is_included = np.array([False, False, True, True])
    whole = run(model_with(math.inf), text, prefix_id=PREFIX, is_included=is_included)
    assert whole.of(is_included).nats == 2.0
    with pytest.raises(NumericsError, match="1 of 4 scored tokens"):
        run(model_with(math.inf), text, prefix_id=PREFIX, is_included=~is_included)


def test_batches_that_are_not_finite_are_not_kept():
    text, settings = (
        Text([2] * 16, [2] * 15 + [BAD_TOKEN]),
        {"context_length": 16, "stride": 16, "batch_size": 1, "prefix_id": 0},
    )
    memory = Memory()
    with pytest.raises(NumericsError):
        run(model_with(math.nan), text, store=memory, **settings)
    assert [values[0].tolist() for values in memory.finished.values()] == [[1.0] * 16]
    memory.finished[1] = np.full((2, 16), np.nan, np.float32)  # as an earlier version kept it
    assert run(model_with(1.0), text, store=memory, **settings).nats == 32.0


def refusal_on_rank(value):
    from megaft.base import parallel as ranks

    topology = ranks.discover(os.environ)
    ranks.join(topology)
    documents = Text(*[[2] * 9] * 3, [2] * 8 + [BAD_TOKEN], [2] * 9)
    try:
        run(model_with(value), documents, context_length=8, stride=8, batch_size=1)
    except NumericsError as error:
        return str(error)
    finally:
        ranks.leave()


@pytest.mark.slow
def test_all_ranks_refuse_together(run_ranks):
    """Only one rank computed the token."""
    said = run_ranks(3, refusal_on_rank, math.nan)
    assert said == [said[0]] * 3
    assert "1 of 40 scored tokens" in said[0]
    assert "token 8 of document 3" in said[0]


def test_a_model_that_returns_nats_scores_the_same(gpt2):
    nats_model = NatsModel(gpt2).eval()
    text, settings = Text(tokens(40, 1), tokens(7, 2)), {"context_length": 16, "stride": 8, "batch_size": 2}

    def head(batch):
        return nats_model(batch.input_ids, batch.labels, positions=batch.positions)[None]

    through_head = run(head, text, **settings)
    assert through_head.token_nats == pytest.approx(run(gpt2, text, **settings).token_nats, rel=1e-5, abs=1e-6)


def test_a_text_without_a_target_is_refused(gpt2):
    with pytest.raises(DataError, match="2 documents"):
        run(gpt2, Text([3], []))


def test_score_has_every_unit():
    result = Score(nats=1000.0, num_scored_tokens=250, num_words=200, num_bytes=1100)
    assert result.as_dict() == pytest.approx(
        {
            "nats": 1000.0,
            "num_scored_tokens": 250,
            "nats_per_token": 4.0,
            "perplexity": math.exp(4),
            "word_perplexity": math.exp(5),
            "bits_per_byte": 1000 / math.log(2) / 1100,
        }
    )
    # lm-evaluation-harness on GPT-2 124M: 37.38 a word is 0.9769 bits a byte at 241,335 words in 1,290,590 bytes.
    gpt2_124m = Score(241_335 * math.log(37.38), 1, 241_335, 1_290_590)
    assert gpt2_124m.word_perplexity == pytest.approx(37.38)
    assert gpt2_124m.bits_per_byte == pytest.approx(0.9769, abs=5e-5)


def test_unknown_units_are_left_out_and_overflow_is_inf():
    result = Score(nats=1e6, num_scored_tokens=1)
    assert result.as_dict() == {
        "nats": 1e6,
        "num_scored_tokens": 1,
        "nats_per_token": 1e6,
        "perplexity": math.inf,
    }


@pytest.mark.slow
def test_a_trained_model_costs_the_same_in_any_batch(corpora, trained_gpt2):
    model = AutoModelForCausalLM.from_pretrained(trained_gpt2, dtype=torch.float32)
    text = (corpora / "wikitext2/wiki.test.tokens").read_text(encoding="utf-8")[:6000]
    ids = PreTrainedTokenizerFast.from_pretrained(trained_gpt2)(text)["input_ids"]
    settings = {
        "context_length": 128,
        "stride": 64,
        "prefix_id": model.config.eos_token_id,
        "num_words": len(text.split()),
    }
    results = [run(model, Text(ids), **settings, batch_size=size) for size in (1, 3, 8)]
    assert [r.nats for r in results] == pytest.approx([results[0].nats] * 3, rel=1e-6)
    assert results[0].num_scored_tokens == len(ids)
    assert results[0].perplexity < 500  # chance is 2,001
