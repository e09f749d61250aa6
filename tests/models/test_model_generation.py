"""Generation with transformers models: with the family's cache if it is exact, otherwise without."""

import inspect

import pytest
import torch
from tiny_models import GPT2, LLAMA, make_config

from megaft.base.errors import DataError
from megaft.commands.generate.config import SamplingConfig
from megaft.commands.generate.sampling import continue_tokens, next_token
from megaft.models.generation import CachedModel, exact_cache

SETTINGS = SamplingConfig(temperature=0, repetition_penalty=1.3)
STATE_SPACE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.1, 4.0, 20.0, 60.0],
    "original_max_position_embeddings": 16,
}
FAMILIES = {  # name: model type, settings, the cache that is used
    "gpt2": ("gpt2", GPT2, "past_key_values"),
    "mamba": ("mamba", STATE_SPACE | {"use_mambapy": False}, "cache_params"),
    "rwkv": ("rwkv", STATE_SPACE | {"attention_hidden_size": 32, "context_length": 64}, "state"),
    "cpm-ant keeps its cache in a form of its own": (
        "cpmant",
        STATE_SPACE | {"dim_head": 8, "num_attention_heads": 4},
        None,
    ),
}


def make(model_type, settings):
    """Return a random model whose next token depends strongly on earlier tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type, settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def cached(model):
    return CachedModel(model, exact_cache(model))


def continuation(decoder, prompt, num_tokens):
    return list(continue_tokens(decoder, prompt, max_new_tokens=num_tokens, settings=SETTINGS, seed=0))


@torch.no_grad()
def brute_force(model, prompt, num_tokens, limit=10**9):
    """Reread the whole window for every token."""
    takes = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in takes else {}
    ids, begin = list(prompt), max(0, len(prompt) - limit)
    for _ in range(num_tokens):
        if len(ids) - begin > limit:
            begin = len(ids) - (limit + 1) // 2
        logits = model(input_ids=torch.tensor([ids[begin:]]), **options).logits[0, -1]
        ids.append(next_token(logits, ids, SETTINGS, torch.Generator()))
    return ids[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_continues_as_without_a_cache(name):
    model_type, settings, cache = FAMILIES[name]
    model = make(model_type, settings)
    decoder = cached(model)
    assert decoder.cache_name == cache
    assert continuation(decoder, [5, 9, 11], 20) == brute_force(model, [5, 9, 11], 20)
    assert continuation(decoder, [7], 5) == brute_force(model, [7], 5)  # another text starts fresh


def forgetful(cache):
    cache.crop(2)
    return cache


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(forgetful, id="it forgets"),
        pytest.param(lambda cache: None, id="it is not returned"),
        pytest.param(lambda cache: 7, id="it is not taken again"),
    ],
)
def test_a_cache_that_is_not_exact_is_not_used(harm):
    model = make("gpt2", GPT2)
    expected = brute_force(model, [5, 9, 11], 20)
    model.register_forward_hook(
        lambda module, inputs, output: type(output)(
            logits=output.logits, past_key_values=output.past_key_values and harm(output.past_key_values)
        )
    )
    decoder = cached(model)
    assert decoder.cache_name is None
    assert continuation(decoder, [5, 9, 11], 20) == expected


def test_a_token_that_the_model_rules_out_hides_no_inexact_cache():
    model = make("gpt2", GPT2)

    def rule_out(module, inputs, output):
        logits = output.logits.index_fill(-1, torch.tensor([3]), -torch.inf)
        return type(output)(logits=logits, past_key_values=output.past_key_values and forgetful(output.past_key_values))

    model.register_forward_hook(rule_out)
    assert exact_cache(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_alone_costs_no_cache(dtype):
    assert exact_cache(make("llama", LLAMA).to(dtype)) == "past_key_values"


@pytest.mark.slow
@pytest.mark.parametrize("prompt_tokens", [10, 15, 16, 17, 20])
def test_longrope_reads_the_text_anew_where_its_frequencies_change(prompt_tokens):
    settings = LLAMA | {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 40,
    }
    model = make("phi3", settings)
    prompt = [(7 * number) % 61 for number in range(prompt_tokens)]
    decoder = cached(model)
    assert decoder.cache_name == "past_key_values"
    assert continuation(decoder, prompt, 60) == brute_force(model, prompt, 60, limit=40)  # through both and back


def test_longrope_equals_transformers_generate_through_the_change():
    settings = LLAMA | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}
    model = make("phi3", settings)
    prompt = torch.tensor([[(7 * number) % 61 for number in range(10)]])
    theirs = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=30,
        do_sample=False,
        repetition_penalty=SETTINGS.repetition_penalty,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert continuation(cached(model), prompt[0].tolist(), 30) == theirs[0, 10:].tolist()


def test_dynamic_scaling_has_other_frequencies_at_every_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make("llama", LLAMA | {"rope_parameters": rope, "max_position_embeddings": 16})
    decoder = cached(model)
    decoder.max_positions = 32  # it is made to be used beyond
    assert continuation(decoder, [5, 9, 11], 25) == brute_force(model, [5, 9, 11], 25)


def test_a_change_of_length_reads_once():
    model = make("phi3", LLAMA | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16})
    decoder = cached(model)
    lengths = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    continuation(decoder, list(range(1, 15)), 6)
    assert lengths == [14, 1, 1, 17, 1, 1]


def test_a_family_that_does_not_count_padding_as_a_position_is_read_anew():
    settings = LLAMA | {"is_decoder": True, "pad_token_id": 1, "type_vocab_size": 1}
    model = make("roberta", settings)
    prompt = [5, 1, 9, 1, 7]
    assert continuation(cached(model), prompt, 12) == brute_force(model, prompt, 12)


def test_a_family_that_needs_more_than_a_text_is_refused():
    with pytest.raises(DataError, match=r"--model is a XmodForCausalLM.*language"):
        exact_cache(make("xmod", LLAMA | {"is_decoder": True, "languages": ["en_XX"], "adapter_reduction_factor": 2}))
