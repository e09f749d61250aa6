"""Verification of an export before it is published, on small models."""

import json
import weakref
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from tiny_models import VOCAB, edit_json
from transformers import AutoModelForCausalLM

from megaft.base.errors import DataError, NumericsError
from megaft.checkpoint.export_check import check_nats, require_same_nats
from megaft.config.train import LoraConfig
from megaft.models import adapters
from megaft.models.hugging_face import NatsModel
from megaft.run.validation import NUM_TOKENS, held_out_rows
from megaft.weights.generation_ids import follow_tokenizer, generation_ids, ids_of, require_same_generation_ids

ROWS = torch.randint(0, VOCAB, (8, 41), generator=torch.Generator().manual_seed(1)).tolist()


def make_model(name):
    return tiny_models.make_model("llama", tie_word_embeddings=True) if "tied" in name else tiny_models.make_model(name)


def adapted(name, targets):
    model = make_model(name)
    adapters.add_adapters(model, LoraConfig(rank=4, target_modules=targets), seed=0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(parameter_name)))
    return model


def rounded(model, dtype):
    adapters.round_weights(model, dtype)
    return NatsModel(model)


TARGETS = [
    ("gpt2", ("wte", "lm_head", "c_attn")),
    ("llama", ("embed_tokens", "lm_head", "q_proj")),
    ("tied llama", ("embed_tokens", "down_proj")),
    ("phi with a head bias", ("lm_head", "q_proj", "fc1")),
    ("gemma2 with capped logits", ("embed_tokens", "o_proj")),  # whose embedding is scaled
    ("granite with scaled logits", ("v_proj",)),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "targets"), TARGETS, ids=[name for name, _ in TARGETS])
def test_merged_adapters_pass(name, targets, dtype, tmp_path):
    adapters.merge_adapters(adapted(name, targets)).to(dtype).save_pretrained(tmp_path)
    verified = check_nats(lambda: rounded(adapted(name, targets), dtype), tmp_path, ROWS)
    assert verified.num_tokens == 8 * 40
    assert verified.exported == pytest.approx(verified.trained, rel=1e-5)


def merged_where_it_is_shared(model):
    """Merge without untying: embedding and output layer both get one adapter."""
    for name, layer in list(adapters.adapted_layers(model)):
        layer.merge()
        adapters.replace_module(model, name, layer.get_base_layer())
    return model


def change_one_row(model):
    with torch.no_grad():
        model.get_parameter("transformer.h.0.attn.c_attn.weight")[3] += 0.01


WRONG = {
    "an adapter merged into both ends": lambda: merged_where_it_is_shared(adapted("gpt2", ("wte",))),
    "an adapter left out": lambda: make_model("gpt2"),
    "a row changed by a hundredth": lambda: changed(change_one_row),
    "a norm of ones": lambda: changed(lambda model: torch.nn.init.ones_(model.transformer.ln_f.weight)),
    "one weight that is not a number": lambda: changed(
        lambda model: torch.nn.init.constant_(model.transformer.ln_f.bias, float("nan"))
    ),
}


def changed(change):
    model = adapters.merge_adapters(adapted("gpt2", ("wte",)))
    change(model)
    return model


@pytest.mark.parametrize("case", WRONG)
def test_another_model_does_not_pass(case, tmp_path):
    model = WRONG[case]()
    model.all_tied_weights_keys = {}
    model.save_pretrained(tmp_path)
    with pytest.raises(NumericsError, match=r"not published: .* 320 "):
        check_nats(lambda: rounded(adapted("gpt2", ("wte",)), torch.float32), tmp_path, ROWS)


def test_one_model_at_a_time_is_in_memory(tmp_path, monkeypatch):
    make_model("gpt2").save_pretrained(tmp_path)
    plain, trained = AutoModelForCausalLM.from_pretrained, []

    def make():
        model = NatsModel(make_model("gpt2"))
        trained.append(weakref.ref(model))
        return model

    def load(*args, **options):
        assert trained[0]() is None
        return plain(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    check_nats(make, tmp_path, ROWS)


@pytest.mark.parametrize(
    ("trained", "exported", "is_same"),
    [
        ([2.0, 4.0], [2.0, 4.0], True),
        ([2.0, 4.0], [2.0005, 3.9995], True),  # a token's may differ, by the order of sums
        ([2.0, 4.0], [2.0001, 4.0], False),  # 1.7e-5 of the mean
        ([2.0, 4.0], [2.01, 3.99], False),
        ([2.0, 4.0], [2.0, float("nan")], False),
        ([float("nan"), 4.0], [float("nan"), 4.0], False),
        ([1e-7, 1e-7], [4e-7, 1e-7], True),  # fp32 logits are not exact to this
        ([0.0, 1e-2], [1e-5, 1e-2], False),
    ],
)
def test_tolerance(trained, exported, is_same, tmp_path):
    nats = [torch.tensor(values, dtype=torch.float64) for values in (trained, exported)]
    if is_same:
        require_same_nats(*nats, tmp_path)
    else:
        with pytest.raises(NumericsError):
            require_same_nats(*nats, tmp_path)


def test_a_trained_model_whose_nats_are_not_finite_is_no_defect_of_the_export(tmp_path):
    nats = torch.tensor([2.0, float("nan"), 4.0], dtype=torch.float64)
    with pytest.raises(NumericsError, match=r"1 of 3 held-out tokens .*not finite") as refused:
        require_same_nats(nats, nats, tmp_path)
    assert "bug in megaft" not in str(refused.value)


# Held-out tokens


class Tokens:
    def __init__(self, ids):
        self.ids, self.num_tokens = np.array(ids), len(ids)

    def read(self, begin, end):
        return self.ids[begin:end]


def test_rows_are_the_opening_of_the_validation_text():
    validation = SimpleNamespace(prefix_id=7, tokens=Tokens(range(10, 1000)))
    rows = held_out_rows(validation, None, 100)
    assert rows[0][:3] == [7, 10, 11]
    assert all(row[-1] == following[0] for row, following in pairwise(rows))
    assert sum(len(row) - 1 for row in rows) == NUM_TOKENS
    assert max(map(len, rows)) == 101


@pytest.mark.parametrize("validation", [None, SimpleNamespace(prefix_id=None, tokens=Tokens([5]))])
def test_rows_without_a_validation_text_are_of_the_training_samples(validation):
    samples = [SimpleNamespace(input_ids=np.arange(length)) for length in [1, 40, 300, *[200] * NUM_TOKENS]]
    rows = held_out_rows(validation, samples, 256)
    assert [len(row) for row in rows] == [40, 257, 200, 200]


def test_a_long_training_sample_gives_no_more_tokens_than_are_compared():
    assert [len(row) for row in held_out_rows(None, [SimpleNamespace(input_ids=np.arange(4000))], 4000)] == [
        NUM_TOKENS + 1
    ]


# Generation


def test_every_end_token_of_the_source_counts(tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[3, 5], pad_token_id=3)
    several = generation_ids(tmp_path)
    assert several == {"bos_token_id": {0}, "eos_token_id": {3, 5}, "pad_token_id": {3}}
    edit_json(tmp_path / "generation_config.json", eos_token_id=3)
    with pytest.raises(DataError, match=r"eos_token_id is \[3\] in transformers, but \[3, 5\]"):
        require_same_generation_ids(several, generation_ids(tmp_path), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert generation_ids(tmp_path) == {"bos_token_id": {0}, "eos_token_id": {0}, "pad_token_id": {0}}


@pytest.mark.parametrize(
    ("configured", "tokenizer", "expected"),
    [
        pytest.param((1, 2), (0, 3), ({0}, {3}), id="the defaults of a class"),
        pytest.param((1, [2, 3, 4]), (1, 3), ({1}, {2, 3, 4}), id="one of several ends is the tokenizer's"),
        pytest.param((1, 2), (None, 3), (set(), {3}), id="a tokenizer without a beginning"),
    ],
)
def test_a_new_model_begins_and_ends_as_its_tokenizer(configured, tokenizer, expected):
    config = make_model("llama").config
    config.bos_token_id, config.eos_token_id = configured
    follow_tokenizer(config, *tokenizer)
    assert (ids_of(config)["bos_token_id"], ids_of(config)["eos_token_id"]) == expected
    assert json.loads(config.to_json_string())["vocab_size"] == VOCAB
