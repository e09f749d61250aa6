import math
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from megaft.base.errors import NumericsError
from megaft.commands.generate.config import SamplingConfig
from megaft.commands.generate.sampling import continue_tokens, filters, next_token
from megaft.models.generation import CachedModel

PROMPT = [5, 17, 3, 17]
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 97}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=96, initializer_range=0.3)).eval()


def logits_of(seed, size=50):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


def run(model, max_new_tokens, settings=GREEDY, seed=0, prompt=PROMPT, **options):
    options = {"max_new_tokens": max_new_tokens, "settings": settings, "seed": seed, **options}
    return list(continue_tokens(CachedModel(model, "past_key_values"), prompt, **options))


def test_filters_that_are_off_are_left_out():
    assert not filters(SamplingConfig())


def test_ties_with_the_last_of_k_stay():
    scores = filters(SamplingConfig(top_k=2))(torch.tensor([[0]]), torch.tensor([[1.0, 2.0, 1.0, 0.0]]))
    assert scores[0].isfinite().tolist() == [True, True, True, False]


@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_hold_p(seed, p):
    logits = logits_of(seed, 30)
    kept = logits.double().softmax(-1)[
        filters(SamplingConfig(top_p=p))(torch.tensor([[0]]), logits[None])[0].isfinite()
    ]
    assert kept.sum() >= p - 1e-6
    assert kept.sum() - kept.min() < p + 1e-6


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(GREEDY, id="greedy"),
        pytest.param(SamplingConfig(temperature=0, repetition_penalty=1.5), id="greedy, no repetition"),
        pytest.param(SamplingConfig(), id="plain"),
        pytest.param(SamplingConfig(temperature=0.7, top_k=20), id="cool, top-k"),
        pytest.param(SamplingConfig(temperature=1.5, top_p=0.8), id="hot, top-p"),
        pytest.param(SamplingConfig(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2), id="all"),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_continuation_equals_transformers_generate(gpt2, settings, seed):
    sampled = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    torch.manual_seed(seed)
    theirs = gpt2.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=12,
        do_sample=settings.temperature > 0,
        repetition_penalty=settings.repetition_penalty,
        eos_token_id=None,
        pad_token_id=0,
        **(sampled if settings.temperature > 0 else {}),
    )
    assert run(gpt2, 12, settings, seed) == theirs[0, len(PROMPT) :].tolist()


def test_a_seed_fixes_the_text_and_another_changes_it(gpt2):
    settings = SamplingConfig()
    texts = [run(gpt2, 12, settings, seed) for seed in (3, 4)]
    torch.manual_seed(99)  # the global generator has no say
    assert run(gpt2, 12, settings, 3) == texts[0] != texts[1]


@pytest.mark.parametrize("prompt_tokens", [1, 15, 16, 17, 40])
def test_a_text_outgrows_the_model_by_dropping_the_older_half(gpt2, prompt_tokens):
    prompt = [(7 * i) % 97 for i in range(prompt_tokens)]
    settings = SamplingConfig(temperature=0, repetition_penalty=1.5)
    ids, begin = list(prompt), max(0, prompt_tokens - 16)
    for _ in range(40):  # the same window without a cache
        if len(ids) - begin > 16:
            begin = len(ids) - 8
        logits = gpt2(torch.tensor([ids[begin:]])).logits[0, -1].detach()
        ids.append(next_token(logits, ids, settings, torch.Generator()))
    assert run(gpt2, 40, settings, prompt=prompt) == ids[prompt_tokens:]


@pytest.mark.parametrize("prompt_tokens", [2, 15, 16, 17, 40])
def test_opening_tokens_stay_in_front_of_what_is_left(gpt2, prompt_tokens):
    prompt = [0, *((7 * i) % 97 for i in range(1, prompt_tokens))]
    ids, begin = list(prompt), max(1, prompt_tokens - 15)
    for _ in range(40):  # 15 positions are left beside the opening token; the same window without a cache
        if len(ids) - begin > 15:
            begin = len(ids) - 8
        logits = gpt2(torch.tensor([[0, *ids[begin:]]])).logits[0, -1].detach()
        ids.append(next_token(logits, ids, GREEDY, torch.Generator()))
    assert run(gpt2, 40, prompt=prompt, num_opening=1) == ids[prompt_tokens:]


def test_a_text_ends_at_eos(gpt2):
    free = run(gpt2, 12)
    eos = free[5]
    assert run(gpt2, 12, end_ids={eos}) == free[: free.index(eos) + 1]
    assert run(gpt2, 12, end_ids={96, free[3], eos}) == free[: free.index(free[3]) + 1]
    assert len(run(gpt2, 12)) == 12


def test_tokens_come_one_at_a_time(gpt2):
    endless = continue_tokens(
        CachedModel(gpt2, "past_key_values"), PROMPT, max_new_tokens=10**9, settings=GREEDY, seed=0
    )
    assert list(islice(endless, 3)) == run(gpt2, 3)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        pytest.param([0.0, math.nan, 1.0], "token 1 has nan", id="NaN"),
        pytest.param([0.0, 1.0, math.inf], "token 2 has inf", id="overflow"),
        pytest.param([-math.inf, -math.inf], "token 0 has -inf", id="nothing is left"),
    ],
)
@pytest.mark.parametrize("settings", [GREEDY, SamplingConfig()], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_are_refused(logits, message, settings):
    with pytest.raises(NumericsError, match=f"after 3 tokens .*{message}"):
        next_token(torch.tensor(logits), [0, 1, 0], settings, torch.Generator())


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [(torch.float32, "check the model's weights"), (torch.bfloat16, "use --dtype float32")],
    ids=["float32", "bfloat16"],
)
def test_float32_is_advised_where_the_model_computes_in_less(dtype, fix):
    with pytest.raises(NumericsError, match=rf"after 1 token .*: .*{fix}\.$"):
        next_token(torch.tensor([0.0, math.nan], dtype=dtype), [0], GREEDY, torch.Generator())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"temperature": 1e-45}, {2}, id="a temperature of float32's least"),
        pytest.param({"temperature": 5e-324}, {2}, id="a temperature that float32 does not have"),
        pytest.param({"temperature": 1e38}, {0, 1, 2}, id="a high temperature draws evenly"),
        pytest.param({"temperature": 1e300}, {0, 1, 2}, id="a temperature above float32"),
        pytest.param({"top_p": 1e-300}, {2}, id="a top-p that float32 does not have"),
        pytest.param({"top_p": 1 - 1e-12}, {0, 1, 2}, id="a top-p of nearly 1"),
        pytest.param({"top_k": 10**30}, {0, 1, 2}, id="a top-k above the vocabulary"),
        pytest.param({"temperature": 1e-45, "top_k": 2, "top_p": 1e-45}, {2}, id="all"),
    ],
)
def test_extreme_settings_draw_what_they_say(settings, expected):
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 1.5, 2.0, -math.inf])  # the model rules the last one out
    drawn = {next_token(logits, [0], SamplingConfig(**settings), generator) for _ in range(200)}
    assert drawn == expected
