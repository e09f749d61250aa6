"""megatron-core's models, sharded over ranks, against transformers'."""

import os
from pathlib import Path

import pytest
import torch
from tiny_models import LLAMA, VOCAB, make_model

from megaft.base.errors import ConfigError

pytestmark = pytest.mark.slow

FAMILIES = {
    "gpt2": ("gpt2", {}),
    "untied gpt2, narrow inside": ("gpt2", {"tie_word_embeddings": False, "n_inner": 48}),
    "llama": ("llama", {}),
    "tied llama, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 12}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral with a sliding window", {"sliding_window": None}),
}
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 6, [0] * 20])


def join(size=None):
    from megaft.base import parallel

    topology = parallel.discover(os.environ)
    parallel.join(topology)
    parallel.start_tensor_parallelism(size or topology.world_size)
    return topology


def megatron_of(source, **options):
    """Return this rank's shard of a model folder or of a transformers model in memory."""
    from megaft.models.megatron import MegatronModel, fill
    from megaft.weights.reading import open_weights

    is_path = isinstance(source, str | Path)
    config, read = (
        (weights.config, weights.read)
        if is_path and (weights := open_weights(str(source)))
        else (source.config, source.state_dict().__getitem__)
    )
    model = MegatronModel(config, **options)
    fill(model, read)
    return model


def logits_of(model, input_ids):
    """Return the logits of the whole vocabulary, gathered from the ranks' shards."""
    from megaft.base import parallel

    parts = parallel.gather_over_tensor_ranks(model(input_ids) @ model.output_layer().weight.T)
    return torch.cat(list(parts), -1)[..., : model.config.vocab_size]


def compared(reference, megatron, vocab_size, documents=None):
    """Return the differences from transformers in logits, mean nats, tokens' nats and (relative) gradients."""
    from megaft.base import parallel
    from megaft.models.hugging_face import NatsModel
    from megaft.models.megatron import MegatronNats

    tokens = torch.randint(0, vocab_size, (2, 21), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, 3:6] = -100
    theirs, ours = NatsModel(reference.eval()), MegatronNats(megatron.eval())
    expected, found = theirs(inputs, labels, documents), ours(inputs, labels, documents)
    expected.backward()
    found.backward()
    grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    size, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    worst = 0.0
    for name, parameter in megatron.gpt.named_parameters():
        wanted = megatron.layout.local(name, [grads[one] for one in megatron.layout.rules[name].sources], size, rank)
        worst = max(worst, float((wanted - parameter.grad).abs().max() / max(1.0, float(wanted.abs().max()))))
    with torch.no_grad():
        scored = (labels != -100).flatten().nonzero().flatten()
        each = (ours(inputs, labels, documents, scored) - theirs(inputs, labels, documents, scored)).abs()
        logits = 0.0
        if documents is None:
            logits = float((logits_of(megatron, inputs) - reference(input_ids=inputs).logits).abs().max())
    return {
        "logits": logits,
        "nats": float((found - expected).abs() / expected),
        "each": float(each.max()),
        "gradient": worst,
    }


def families_on_this_rank():
    join()
    found = {}
    for name, (kind, changes) in FAMILIES.items():
        reference = make_model(kind, **changes)
        found[name] = compared(reference, megatron_of(reference), VOCAB)
        reference.zero_grad()
        found[name + ", documents apart"] = compared(reference, megatron_of(reference), VOCAB, DOCUMENTS)
    return found


@pytest.fixture(scope="module", params=[1, 2])
def families(request, run_ranks):
    ranks = run_ranks(request.param, families_on_this_rank)
    assert all(rank.keys() == ranks[0].keys() for rank in ranks)
    return ranks


@pytest.mark.parametrize("name", [one + which for one in FAMILIES for which in ("", ", documents apart")])
def test_logits_nats_and_gradients_are_those_of_transformers(families, name):
    for rank in families:
        assert rank[name]["logits"] < 1e-4
        assert rank[name]["nats"] < 1e-6
        assert rank[name]["each"] < 1e-4
        assert rank[name]["gradient"] < 1e-4


def trained_model_on_this_rank(source):
    from megaft.weights.loading.pretrained import load_language_model

    join()
    reference = load_language_model(str(source))
    return compared(reference, megatron_of(source), reference.config.vocab_size)


@pytest.mark.parametrize("size", [1, 4])
def test_a_trained_gpt2(run_ranks, trained_gpt2, size):
    for found in run_ranks(size, trained_model_on_this_rank, trained_gpt2):
        assert found["logits"] < 1e-4
        assert found["nats"] < 1e-6


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 3])
def test_smollm2(run_ranks, smollm2_cut, size):
    """Nine heads in three groups cannot be sharded over two ranks, only over three."""
    for found in run_ranks(size, trained_model_on_this_rank, smollm2_cut):
        assert found["logits"] < 1e-4
        assert found["nats"] < 1e-6


def dropout_on_this_rank():
    from megaft.base import parallel
    from megaft.models.megatron import Attention, MegatronNats

    join()
    reference = make_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    tokens = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(1))
    found = {}
    for recompute in (False, True):
        model = MegatronNats(megatron_of(reference, recompute=recompute)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            nats = model(tokens[:, :-1], tokens[:, 1:].contiguous())
            optimizer.zero_grad()
            nats.backward()
            optimizer.step()
            losses.append(nats.item().hex())
        found["recomputed" if recompute else "kept"] = losses
        everywhere = [one for one in model.parameters() if not one.tensor_model_parallel]
        flat = torch.cat([one.detach().flatten() for one in everywhere])
        found["num_equal"] = int((parallel.gather_over_tensor_ranks(flat) == flat).all(0).sum()), flat.numel()
    (attention, *_) = [module for module in model.modules() if isinstance(module, Attention)]
    torch.manual_seed(7)
    query = torch.randn(8, 2, 2, 8)
    attended = parallel.gather_over_tensor_ranks(attention(query, query, query, None))
    found["masks_differ"] = not torch.equal(attended[0], attended[1])
    found["next_draw"] = parallel.gather_over_tensor_ranks(torch.rand(1)).flatten().tolist()
    return found


def test_dropout_and_recomputation_on_two_ranks(run_ranks):
    """Replicated weights stay equal, attention dropout differs, recomputation leaves the loss bit-identical."""
    first, second = run_ranks(2, dropout_on_this_rank)
    assert first == second
    assert first["kept"] == first["recomputed"]
    num_equal, numel = first["num_equal"]
    assert num_equal == numel > 1000
    assert first["masks_differ"]
    assert first["next_draw"][0] == first["next_draw"][1]


def loss_in_chunks_on_this_rank(num_words):
    from megaft.base import hardware, parallel
    from megaft.models import loss
    from megaft.models.linear_nats import LinearNats
    from megaft.weights.families import Rule
    from megaft.weights.layout import local

    join()
    size, rank = parallel.tensor_parallel_size(), parallel.tensor_parallel_rank()
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 8, generator=generator) for rows in (23, num_words))
    labels = torch.randint(0, num_words, (23,), generator=generator)
    mine = local(Rule(("words",), 0, rows=num_words), [weight], size, rank)
    begin = rank * len(mine)
    hardware.CHUNK_BYTES["cpu"] = 600  # five tokens of the last rank's 30 words, or four of 31
    words = loss.VocabularyShard(begin, min(begin + len(mine), num_words), is_sharded=True)
    found = LinearNats.apply(hidden.requires_grad_(), mine, None, labels, words)
    found.backward()
    expected = loss.token_nats(hidden @ weight.T, labels).sum()
    (gradient,) = torch.autograd.grad(expected, hidden)
    return float((found - expected).abs() / expected), float((hidden.grad - gradient).abs().max())


def test_ranks_with_fewer_words_cut_the_tokens_into_the_same_chunks(run_ranks):
    for differences in run_ranks(2, loss_in_chunks_on_this_rank, 61):
        assert max(differences) < 1e-5


def new_model_on_this_rank():
    from megaft.models.megatron import MegatronModel, fill
    from megaft.weights.new_weights import new_weights

    join()
    config = make_model("gpt2").config
    model = MegatronModel(config)
    fill(model, new_weights(config, seed=3).read)
    return logits_of(model.eval(), torch.arange(12).unsqueeze(0)).detach().numpy()


def test_a_new_model_is_the_same_on_any_number_of_ranks(run_ranks):
    alone, cut = (run_ranks(size, new_model_on_this_rank)[0] for size in (1, 4))
    assert alone.std() > 0.01
    assert abs(cut - alone).max() < 1e-6


REFUSED = {
    "attention groups": ("llama", {}, 4, "2 KV heads and .* are not both divisible by 4, .*; use one of 1, 2"),
    "a rank without words": (
        "gpt2",
        {"vocab_size": 5},
        4,
        "its 5 vocabulary entries are too few for 4 .* 1, 2",
    ),
    "window": ("mistral with a sliding window", {}, 1, "sliding window"),
    "activation": ("gpt2", {"activation_function": "tanh"}, 1, "activation is tanh"),
    "two dropouts": ("gpt2", {"embd_pdrop": 0.2, "resid_pdrop": 0.1}, 1, "set --model.dropout"),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        1,
        "rope_type is yarn",
    ),
}


@pytest.fixture
def pretended(request):
    from megaft.base import parallel

    parallel.join_fake_group(request.param)
    parallel.start_tensor_parallelism(request.param)
    yield
    parallel.leave()


@pytest.mark.parametrize(
    ("pretended", "kind", "changes", "message"),
    [pytest.param(size, kind, changes, message, id=name) for name, (kind, changes, size, message) in REFUSED.items()],
    indirect=["pretended"],
)
def test_what_megatron_has_not_is_refused(pretended, kind, changes, message):
    from megaft.models.megatron import MegatronModel

    with pytest.raises(ConfigError, match=message):
        MegatronModel(make_model(kind, **changes).config)


@pytest.mark.parametrize("pretended", [8], indirect=True)
def test_a_rank_holds_its_part_only(pretended):
    from megaft.models.megatron import MegatronModel

    settings = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 64, "head_dim": 4}
    config = make_model("llama", **settings).config
    model = MegatronModel(config)
    numels = {name: parameter.numel() for name, parameter in model.gpt.named_parameters()}
    assert numels["decoder.layers.0.mlp.linear_fc1.weight"] == 2 * 64 * 32 // 8
    assert numels["embedding.word_embeddings.weight"] == 64 * 32 // 8  # 61 words, filled up
    assert numels["decoder.final_layernorm.weight"] == 32
