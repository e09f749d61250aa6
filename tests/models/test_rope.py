"""LongRoPE: the longest row sets a batch's frequencies, so short and long rows never share a batch."""

import numpy as np
import pytest
import torch
from tiny_models import LLAMA, VOCAB, logits_of, make_config

from megaft.base.errors import ConfigError
from megaft.data.batches import BatchSplit, collate, micro_batches
from megaft.data.samples import IGNORE_INDEX, CorpusSamples, Sample
from megaft.data.sequence import Samples
from megaft.models.hugging_face import NatsModel
from megaft.models.loss import token_nats
from megaft.models.rope import length_limit
from megaft.scoring.model import ScoringModel
from megaft.scoring.score import rows_of, score
from megaft.scoring.windows import windows
from megaft.weights.loading.trial_model import add_noise

SWITCH, CONTEXT = 70, 100
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [1.1, 4.0, 20.0, 60.0]}
LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS}
LENGTHS = [13, 90, 71, 70, 8, 77, 20, 100]


@pytest.fixture(scope="module")
def long_rope():
    """A Phi-3 whose rotary positions change beyond 70 tokens."""
    from transformers import AutoModelForCausalLM

    settings = LLAMA | {"max_position_embeddings": CONTEXT, "original_max_position_embeddings": SWITCH}
    torch.manual_seed(0)
    config = make_config("phi3", settings | {"rope_parameters": LONG_ROPE})
    return add_noise(AutoModelForCausalLM.from_config(config)).eval()


class Texts(CorpusSamples):
    """A corpus of random texts with these LENGTHS."""

    sha256 = "texts"

    def __init__(self, context_length=CONTEXT, is_packed=False, attend_within_documents=False):
        self.context_length, self.is_packed = context_length, is_packed
        self.attend_within_documents = attend_within_documents

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        tokens = np.random.default_rng(index).integers(0, VOCAB, LENGTHS[index] + 1)
        return Sample(tokens[:-1], tokens[1:], np.zeros(LENGTHS[index], np.int64))


def samples_of(*settings) -> Samples:
    return Samples([Texts(*settings)], [1], seed=0)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        pytest.param(LONG_ROPE | {"original_max_position_embeddings": 40}, 40, id="longrope"),
        pytest.param({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64, id="dynamic NTK"),
        pytest.param({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "alpha": 9.0}, None, id="constant NTK"),
        pytest.param({"rope_type": "default", "rope_theta": 1e4}, None, id="plain"),
        pytest.param({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, None, id="linear"),
        pytest.param(
            {"full_attention": LONG_ROPE | {"original_max_position_embeddings": 32}, "sliding_attention": LONG_ROPE},
            32,
            id="by kind of layer",
        ),
    ],
)
def test_the_longest_input_whose_length_is_not_felt(parameters, expected):
    config = make_config("llama", LLAMA)
    config.rope_parameters = parameters
    if "full_attention" in parameters:
        parameters["sliding_attention"] = parameters["sliding_attention"] | {"original_max_position_embeddings": 48}
    assert length_limit(config) == expected


@pytest.mark.parametrize(
    ("is_packed", "context", "rope_length_limit", "expected"),
    [
        pytest.param(False, 100, None, None, id="plain, documents"),
        pytest.param(True, 100, None, 100, id="plain, stream"),
        pytest.param(False, 100, 40, 100, id="switch inside the context"),
        pytest.param(False, 40, 40, None, id="switch beyond the context"),
    ],
)
def test_rows_are_padded_to_the_context_where_lengths_are_felt(is_packed, context, rope_length_limit, expected):
    assert samples_of(context, is_packed).row_length(rope_length_limit) == expected


def test_packed_documents_on_both_sides_of_the_switch_are_refused():
    samples = samples_of(CONTEXT, True, True)
    with pytest.raises(ConfigError, match=r"^--data\.attend-within-documents .*use --data\.context-length 70 or less"):
        samples.row_length(SWITCH)
    assert samples.row_length(None) == CONTEXT


def losses(model, micro_batch_size, row_length):
    """Return the loss of one global batch, split into micro-batches."""
    cut = BatchSplit(micro_batch_size, 8 // micro_batch_size, rank=0, num_ranks=1)
    batches = micro_batches(samples_of(), 0, (), cut, row_length)
    with torch.no_grad():
        nats = sum(float(model(batch.input_ids, batch.labels)) for batch in batches)
    return nats / sum(batch.num_scored for batch in batches)


def test_the_loss_does_not_depend_on_the_micro_batch_size(long_rope):
    model = NatsModel(long_rope)
    row_length = samples_of().row_length(length_limit(long_rope.config))
    by_size = [losses(model, size, row_length) for size in (1, 2, 4, 8)]
    assert by_size == pytest.approx([by_size[0]] * 4, abs=1e-6)
    assert abs(losses(model, 1, None) - losses(model, 4, None)) > 1e-4  # it is felt


def test_rounding_up_gives_no_row_beyond_the_context():
    """A model of 100 positions cannot read rows of 128."""
    rows = [Texts()[index] for index in range(2)]
    assert collate(rows, 0, None, False, longest=CONTEXT).input_ids.shape == (2, CONTEXT)
    assert collate(rows[:1], 0, None, False, longest=CONTEXT).input_ids.shape == (1, 64)


class Tokens:
    """Texts with these LENGTHS, concatenated."""

    document_offsets = np.cumsum([0, *LENGTHS])

    def read(self, begin, end):
        return np.random.default_rng(0).integers(0, VOCAB, sum(LENGTHS))[begin:end]


@pytest.mark.parametrize("tokens_per_batch", [100, 250, 10_000])
def test_each_row_is_scored_as_alone(long_rope, tokens_per_batch):
    """Windows with equal numbers of targets and lengths on both sides of the switch, which is not a power of two."""
    corpus = Tokens()
    rows = rows_of(corpus, lambda num_tokens: windows(num_tokens, CONTEXT, 8))
    expected = np.zeros(sum(LENGTHS))
    for row in rows:
        window = row.window
        tokens = torch.from_numpy(corpus.read(row.first + window.begin, row.first + window.end)).unsqueeze(0)
        labels = tokens[:, 1:].clone()
        labels[:, : window.scored_from - window.begin - 1] = IGNORE_INDEX
        nats = token_nats(logits_of(long_rope, tokens[:, :-1]), labels)
        expected[row.target_positions] = nats[labels != IGNORE_INDEX].numpy()
    found = score(
        corpus,
        rows,
        ScoringModel(long_rope),
        tokens_per_batch=tokens_per_batch,
        device=torch.device("cpu"),
        rope_length_limit=length_limit(long_rope.config),
    )
    np.testing.assert_allclose(found.token_nats, expected, atol=2e-5)
