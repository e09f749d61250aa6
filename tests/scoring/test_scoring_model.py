import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scoring_batches import batch_of, grid_of
from tiny_models import VOCAB, logits_of, make_model
from torch import nn
from transformers import AutoTokenizer, GPT2Config, LlamaConfig
from transformers.activations import NewGELUActivation

from megaft.base import half_precision, hardware
from megaft.base.errors import DataError
from megaft.config.train import LoraConfig
from megaft.data.samples import IGNORE_INDEX
from megaft.models.adapters import add_adapters
from megaft.scoring.last_layer import AnyTrunk, GPT2Trunk, LlamaTrunk
from megaft.scoring.model import LogitsTrunk, ScoringHead, ScoringModel, load_scoring_model, tokens_per_batch
from megaft.weights.loading.pretrained import load_language_model

TIME = 24
CPU = torch.device("cpu")
FAMILIES = [
    pytest.param("gpt2", {}, GPT2Trunk, id="gpt2"),
    pytest.param("gpt2", {"n_layer": 1}, GPT2Trunk, id="gpt2 of one layer"),
    pytest.param("gpt2", {"scale_attn_by_inverse_layer_idx": True}, GPT2Trunk, id="gpt2 with layer scales"),
    pytest.param("llama", {}, LlamaTrunk, id="llama"),
    pytest.param("llama", {"tie_word_embeddings": True}, LlamaTrunk, id="llama, tied"),
    pytest.param("llama", {"num_key_value_heads": 4, "attention_bias": True}, LlamaTrunk, id="llama, full heads"),
    pytest.param("mistral with a sliding window", {}, AnyTrunk, id="mistral, short window"),
    pytest.param("mistral with a sliding window", {"sliding_window": None}, LlamaTrunk, id="mistral, no window"),
    pytest.param("qwen2", {}, LlamaTrunk, id="qwen2"),
    pytest.param(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        AnyTrunk,
        id="qwen2, window",
    ),
    pytest.param("qwen3", {}, LlamaTrunk, id="qwen3"),
    pytest.param("gpt-neox", {}, AnyTrunk, id="gpt-neox"),
    pytest.param("phi with a head bias", {}, AnyTrunk, id="phi"),
    pytest.param("bloom", {}, AnyTrunk, id="bloom"),
    pytest.param("gemma2 with capped logits", {}, LogitsTrunk, id="gemma2"),
    pytest.param("granite with scaled logits", {}, LogitsTrunk, id="granite"),
]
# name: the columns scored in each row
SCORED = {
    "the last of each row": [range(20, 24)] * 3,
    "ragged": [range(3, 9), [23], [0, 4, 5, 11, 20]],
    "all": [range(TIME)] * 3,
    "most": [range(2, 24), range(15), range(1)],
    "half": [range(12, 24)] * 3,
    "one in a row": [[7], [0], [23]],
    "none in a row": [range(18, 24), [], [2]],
    "one in the batch": [[], [], [5]],
    "none": [[], [], []],
}


def make_batch(columns, time=TIME, vocab=VOCAB, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randint(0, vocab, (2, len(columns), time), generator=generator)
    labels = torch.full_like(inputs, IGNORE_INDEX)
    for row, scored in enumerate(columns):
        labels[row, list(scored)] = targets[row, list(scored)]
    return inputs, labels


def reference_nats(model, inputs, labels):
    logits = logits_of(model, inputs).float()
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return nats.view(labels.shape)


# Nats and choices against transformers' logits


@pytest.mark.parametrize(("name", "changes", "trunk"), FAMILIES)
@pytest.mark.parametrize("columns", SCORED.values(), ids=SCORED)
def test_nats_are_those_of_full_logits(name, changes, trunk, columns):
    model = make_model(name, **changes)
    inputs, labels = make_batch(columns)
    scoring_model = ScoringModel(model)
    assert type(scoring_model.trunk) is trunk
    nats = grid_of(scoring_model, inputs, labels)
    assert nats.shape == (1, *labels.shape)
    torch.testing.assert_close(nats[0], reference_nats(model, inputs, labels), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "changes", "trunk"), FAMILIES)
def test_choices_are_the_largest_logits(name, changes, trunk, monkeypatch):
    monkeypatch.setitem(hardware.CHUNK_BYTES, "cpu", 4 * VOCAB * 5)  # several chunks
    model = make_model(name, **changes)
    inputs, labels = make_batch(SCORED["ragged"])
    choices = logits_of(model, inputs).argmax(-1)
    is_scored = labels != IGNORE_INDEX
    labels[:, ::2] = torch.where(is_scored, choices, labels)[:, ::2]  # about half of them right
    quantities = grid_of(ScoringModel(model, with_greedy=True), inputs, labels)
    assert torch.equal(quantities[1], (choices == labels).float())
    assert 0 < quantities[1].sum() < is_scored.sum()
    torch.testing.assert_close(quantities[0], reference_nats(model, inputs, labels), rtol=1e-6, atol=0)


def test_banned_tokens_are_never_the_greedy_choice():
    model = make_model()
    inputs, labels = make_batch([range(4, 7), [3, 9], [], [20]])
    logits = logits_of(model, inputs)
    best, first = logits.argmax(-1), [(0, 4), (1, 3), (3, 20)]
    banned = sorted({int(best[place]) for place in first})
    expected = best.clone()
    for place in first:
        allowed = logits[place].clone()
        allowed[banned] = -torch.inf
        expected[place] = allowed.argmax()
    is_scored = labels != IGNORE_INDEX
    labels = torch.where(is_scored, expected, labels)
    free = grid_of(ScoringModel(model, with_greedy=True), inputs, labels)
    filtered = grid_of(ScoringModel(model, with_greedy=True, banned=banned), inputs, labels)
    assert torch.equal(filtered[1], is_scored.float())
    assert torch.equal(free[1], (is_scored & (best == expected)).float())
    assert torch.equal(filtered[0], free[0])


def test_the_first_of_equal_logits_is_the_choice():
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    labels = torch.tensor([[0, 1, 0, IGNORE_INDEX], [2, 3, 0, 0]])
    inputs = torch.zeros_like(labels)
    flags = grid_of(ScoringModel(model, with_greedy=True), inputs, labels)[1]
    assert flags.tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    flags = grid_of(ScoringModel(model, with_greedy=True, banned=[0, 1]), inputs, labels)[1]
    assert flags.tolist() == [[0, 0, 1, 0], [1, 0, 1, 1]]


# What is computed, and where


def count_rows(modules):
    """Count the positions that each module sees."""
    seen = dict.fromkeys(modules, 0)
    for name, module in modules.items():

        def count(_, inputs, name=name):
            seen[name] += inputs[0].numel() // inputs[0].shape[-1]

        module.register_forward_pre_hook(count)
    return seen


@pytest.mark.parametrize(
    ("name", "columns", "num_queries"),
    [
        pytest.param("llama", SCORED["the last of each row"], 12, id="window"),
        pytest.param("llama", SCORED["ragged"], 18, id="ragged"),
        pytest.param("llama", SCORED["one in the batch"], 3, id="one"),
        pytest.param("llama", SCORED["none"], 3, id="none"),
        pytest.param("llama", SCORED["most"], 72, id="most: attention is causal, and that takes all queries"),
        pytest.param("gpt2", SCORED["ragged"], None, id="gpt2"),
    ],
)
def test_unscored_positions_are_keys_and_values_only(name, columns, num_queries):
    model = make_model(name)
    scoring_model = ScoringModel(model)
    if name == "gpt2":
        last, norm, first_mlp = model.transformer.h[-1], model.transformer.ln_f, model.transformer.h[0].mlp
        parts = {"output": last.attn.c_proj, "post norm": last.ln_2}
    else:
        last, norm, first_mlp = model.model.layers[-1], model.model.norm, model.model.layers[0].mlp
        parts = {"output": last.self_attn.o_proj, "post norm": last.post_attention_layernorm}
    seen = count_rows(parts | {"mlp": last.mlp, "norm": norm, "head": scoring_model.head})
    everywhere = count_rows({"mlp of the first layer": first_mlp})
    around = {} if name == "gpt2" else count_rows({"q": last.self_attn.q_proj, "k": last.self_attn.k_proj})
    scoring_model(batch_of(*make_batch(columns)))
    assert set(seen.values()) == {sum(map(len, columns))}
    assert everywhere == {"mlp of the first layer": 3 * TIME}
    if around:
        assert around == {"q": num_queries, "k": 3 * TIME}


def test_a_known_head_never_sees_an_unscored_position():
    scoring_model = ScoringModel(make_model("gpt-neox"))
    seen = count_rows({"head": scoring_model.head})
    scoring_model(batch_of(*make_batch(SCORED["ragged"])))
    assert seen == {"head": 12}


def test_columns_that_no_row_scores_get_no_logits():
    model = make_model("gemma2 with capped logits")
    scoring_model = ScoringModel(model)
    seen = count_rows({"head": model.get_output_embeddings()})
    scoring_model(batch_of(*make_batch([[2, 3], [3], [3, 9]])))
    assert seen == {"head": 3 * 3}


def test_there_are_no_gradients_and_no_dropout():
    model = make_model(resid_pdrop=0.5).train()
    scoring_model = ScoringModel(model)
    batch = batch_of(*make_batch(SCORED["ragged"]))
    nats = scoring_model(batch)
    assert not nats.requires_grad
    assert torch.equal(nats, scoring_model(batch))
    with torch.inference_mode():
        assert torch.equal(nats, scoring_model(batch))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_eager_attention_takes_the_general_path(name):
    """Without torch's fused attention, a layer without a mask attends to later tokens."""
    model = make_model(name)
    model.set_attn_implementation("eager")
    inputs, labels = make_batch(SCORED["ragged"])
    scoring_model = ScoringModel(model)
    assert type(scoring_model.trunk) is AnyTrunk
    torch.testing.assert_close(
        grid_of(scoring_model, inputs, labels)[0], reference_nats(model, inputs, labels), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(("name", "trunk"), [("gpt2", AnyTrunk), ("llama", LlamaTrunk)])
def test_adapters_count(name, trunk):
    """GPT-2's adapter is on the fused projection, whose weight the fast path would split without it."""
    model = make_model(name)
    add_adapters(model, LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():  # an adapter begins as zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    inputs, labels = make_batch(SCORED["ragged"])
    scoring_model = ScoringModel(model)
    assert type(scoring_model.trunk) is trunk
    torch.testing.assert_close(
        grid_of(scoring_model, inputs, labels)[0], reference_nats(model, inputs, labels), rtol=1e-6, atol=0
    )


# bf16


def test_cross_entropy_is_in_float32(monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", ())
    layer = nn.Linear(16, 1000, bias=False).bfloat16()
    states, labels = torch.randn(50, 16).bfloat16(), torch.randint(0, 1000, (50,))
    nats = ScoringHead(layer, False, ())(states, labels, np.zeros(50, np.bool_))[0].detach()
    logits = layer(states).detach()
    assert torch.equal(nats, F.cross_entropy(logits.float(), labels, reduction="none"))
    assert not torch.equal(nats, F.cross_entropy(logits, labels, reduction="none").float())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "gemma2 with capped logits"])
def test_bf16_nats_are_those_of_bf16_logits(name, monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", ())
    model = make_model(name).bfloat16()
    inputs, labels = make_batch(SCORED["all"])
    nats = grid_of(ScoringModel(model), inputs, labels)[0]
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, reference_nats(model, inputs, labels), rtol=1e-6, atol=0)


def test_without_fast_bf16_the_logits_are_not_rounded(monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", (torch.bfloat16,))
    layer = nn.Linear(16, 1000, bias=False).bfloat16()
    states, labels = torch.randn(50, 16).bfloat16(), torch.randint(0, 1000, (50,))
    nats = ScoringHead(layer, False, ())(states, labels, np.zeros(50, np.bool_))[0].detach()
    expected = F.cross_entropy(states.float() @ layer.weight.float().T, labels, reduction="none")
    torch.testing.assert_close(nats, expected, rtol=1e-6, atol=0)


# Loading

NUM_PARAMETERS = (2001 + 1024) * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64
"""Embeddings of tokens and positions; matrices, biases and norms of three layers; the final norm."""
TEXT = " = Robert Boulter = \n Robert Boulter is an English film , television and theatre actor . He had a guest @-@ "


@pytest.fixture(scope="module")
def trained(trained_gpt2):
    return str(trained_gpt2)


def test_a_trained_model_on_real_text(trained):
    model = load_language_model(trained)
    ids = torch.tensor(AutoTokenizer.from_pretrained(trained)(TEXT * 3)["input_ids"]).unsqueeze(0)
    inputs, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[:, :-20] = IGNORE_INDEX
    scorer = load_scoring_model(trained, dtype=torch.float32, device=CPU).configure(with_greedy=True)
    quantities = grid_of(scorer, inputs, labels)
    torch.testing.assert_close(quantities[0], reference_nats(model, inputs, labels), rtol=1e-6, atol=0)
    assert torch.equal(quantities[1], (logits_of(model, inputs).argmax(-1) == labels).float())
    assert (scorer.num_parameters, scorer.context_limit, scorer.vocab_size) == (NUM_PARAMETERS, 1024, 2001)
    assert not any(type(module) is NewGELUActivation for module in scorer.model.modules())  # fused, and the same
    assert any(type(module) is NewGELUActivation for module in model.modules())


def test_loading_in_bf16(trained):
    scorer = load_scoring_model(trained, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.bfloat16}


def test_a_model_that_is_not_there():
    with pytest.raises(DataError, match=r"--model is \./nowhere"):
        load_scoring_model("./nowhere", dtype=torch.float32, device=CPU)


# Ranks


def save_model(folder, name):
    """A Llama or Phi whose matrices are too large for ZeRO-3 to replicate."""
    model = make_model(name, vocab_size=5000, hidden_size=256, intermediate_size=1024, head_dim=64)
    model.save_pretrained(folder)
    return str(folder)


# One rank's windows are all scored while another's are hardly; one has nothing to score at all.
DEALS = [["all", "the last of each row", "none"], ["none", "all", "ragged"], ["ragged", "ragged", "ragged"]]


def score_partitioned(models):
    """Return for each model the bytes held, elements gathered, elements in total and this rank's quantities."""
    from megaft.base import parallel

    device = parallel.join(parallel.discover(os.environ))
    results = []
    for source, dtype in models:
        scorer = load_scoring_model(source, dtype=dtype, device=device, is_partitioned=True).configure(with_greedy=True)
        parameters = list(scorer.model.module.parameters())
        held = sum(parameter.ds_tensor.numel() * parameter.ds_tensor.element_size() for parameter in parameters)
        gathered = sum(parameter.numel() for parameter in parameters)
        results.append((held, gathered, scorer.num_parameters, quantities_of(scorer, parallel.data_parallel_rank())))
    parallel.leave()
    return results


def quantities_of(scorer, rank):
    return [scorer(batch_of(*make_batch(SCORED[deal[rank]], seed=rank))).tolist() for deal in DEALS + DEALS]


@pytest.mark.slow
def test_three_ranks_with_a_third_each_score_as_one_with_all(trained, tmp_path, run_ranks):
    llama, phi = (save_model(tmp_path / name, name) for name in ("llama", "phi with a head bias"))
    models = [(trained, torch.bfloat16), (llama, torch.float32), (phi, torch.float32)]
    ranks = run_ranks(3, score_partitioned, models)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    for (source, dtype), *results in zip(models, *ranks, strict=True):
        scorer = load_scoring_model(source, dtype=dtype, device=CPU).configure(with_greedy=True)
        for rank, (held, gathered, num_parameters, quantities) in enumerate(results):
            assert num_parameters == scorer.num_parameters
            assert gathered == 0  # straight after loading
            assert held == pytest.approx(num_parameters * dtype.itemsize / 3, rel=0.01)
            expected = quantities_of(scorer, rank)
            if dtype == torch.bfloat16:
                assert quantities == expected
            else:  # a whole model on a CPU multiplies packed matrices: a token's logits, of some 10, round otherwise
                for ours, theirs in zip(quantities, expected, strict=True):
                    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-5)
    torch.set_num_threads(threads)


def score_narrow_and_wide(source):
    from megaft.base import parallel

    device = parallel.join(parallel.discover(os.environ))
    scorer = load_scoring_model(source, dtype=torch.float32, device=device, is_partitioned=True)
    times = [2, TIME] if parallel.is_main() else [TIME, 2]
    nats = [scorer(batch_of(*make_batch([range(time)], time=time))).sum().item() for time in times]
    parallel.leave()
    return nats


@pytest.mark.slow
def test_ranks_need_not_agree_whether_a_batch_is_wider_than_the_models_window(tmp_path, run_ranks):
    narrow_first, wide_first = run_ranks(
        2, score_narrow_and_wide, save_model(tmp_path / "model", "mistral with a sliding window")
    )
    assert narrow_first == wide_first[::-1]


# Batches

GPT2_XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
LLAMA_70B = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("config", [GPT2_XL, LLAMA_70B], ids=["gpt2-xl", "llama-70b"])
@pytest.mark.parametrize("context_length", [1, 1024, 10**7])
def test_a_batch_holds_a_row_at_least(config, context_length, device_type):
    assert tokens_per_batch(config, context_length, device_type, torch.float32) >= context_length


def test_a_batch_on_cuda_shrinks_with_the_model_and_the_precision():
    def tokens(config, dtype=torch.bfloat16):
        return tokens_per_batch(config, 1024, "cuda", dtype)

    assert tokens(GPT2_XL) == 2 * tokens(GPT2_XL, torch.float32)
    assert tokens(GPT2_XL) > 32 * 1024  # enough to fill an H100
    assert tokens(LLAMA_70B) < tokens(GPT2_XL)
