"""Attention without transformers' masks is attention with them, bit for bit."""

import json
from copy import deepcopy

import pytest
import torch
from tiny_models import VOCAB, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import create_causal_mask

from megaft.models.attention import CAUSAL, attend_without_masks, document_mask, is_plainly_causal
from megaft.models.hugging_face import NatsModel, positions_within
from megaft.scoring.last_layer import fast_trunk
from megaft.weights.loading.trial_model import create_trial_model

PLAIN: dict[str, dict] = {
    "gpt2": {},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral with a sliding window": {"sliding_window": None},
}
TOKENS = torch.randint(0, VOCAB, (2, 19), generator=torch.Generator().manual_seed(2))
LABELS = torch.randint(0, VOCAB, TOKENS.shape, generator=torch.Generator().manual_seed(3))
DOCUMENTS = torch.tensor([[7] * 5 + [8] + [9] * 9 + [10] * 4, [3] * 16 + [-1] * 3])


def pair(name, **changes):
    """Return a model and its copy that attends without masks."""
    model = make_model(name, **(PLAIN[name] | changes))
    other = deepcopy(model)
    attend_without_masks(other)
    assert model.config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == CAUSAL
    return model, other


def nats_and_gradients(model, document_ids, *, is_checkpointed=False):
    model.train()
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    nats_model = NatsModel(model)
    torch.manual_seed(0)  # GPT-2 has dropout
    nats = nats_model(TOKENS, LABELS, document_ids)
    nats.backward()
    return nats.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("document_ids", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("name", PLAIN)
def test_nats_and_gradients_are_the_same_bits(name, document_ids):
    model, other = pair(name)
    expected, gradients = nats_and_gradients(model, document_ids)
    for is_checkpointed in (False, True):
        other.zero_grad()
        nats, same = nats_and_gradients(other, document_ids, is_checkpointed=is_checkpointed)
        assert torch.equal(nats, expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(same, gradients, strict=True))


@pytest.mark.parametrize("name", PLAIN)
def test_a_trial_model_has_the_same_bits(name):
    trial_model = create_trial_model(make_model(name, **PLAIN[name]))
    assert trial_model is not None
    tokens = TOKENS % trial_model.config.vocab_size
    with torch.no_grad():
        expected = trial_model(input_ids=tokens, use_cache=False).logits
        attend_without_masks(trial_model)
        assert trial_model.config._attn_implementation == CAUSAL
        assert torch.equal(trial_model(input_ids=tokens, use_cache=False).logits, expected)


def test_the_mask_of_documents_is_transformers_own():
    model = make_model("llama")
    expected = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(*TOKENS.shape, model.config.hidden_size),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_within(DOCUMENTS),
    )
    assert expected is not None
    assert torch.equal(document_mask(DOCUMENTS), expected)


class Waits(TorchDispatchMode):
    """Count the calls for which the host waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("document_ids", [None, DOCUMENTS], ids=["causal", "documents"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_forward_pass_waits_for_nothing(name, document_ids):
    for model, expected in zip(pair(name, pad_token_id=0), (True, False), strict=True):
        nats_model = NatsModel(model)
        with Waits() as waits:
            nats_model(TOKENS, LABELS, document_ids)
        assert bool(waits.count) is expected


OTHERS = [
    ("mistral with a sliding window", {}),
    ("bloom", {}),
    ("gemma2 with capped logits", {}),
    ("llama", {"is_causal": False}),
    ("gpt2", {"add_cross_attention": True}),
]


@pytest.mark.parametrize(("name", "changes"), OTHERS)
def test_other_attention_keeps_transformers_masks(name, changes):
    model = make_model(name, **changes)
    attend_without_masks(model)
    assert not is_plainly_causal(model)
    assert model.config._attn_implementation != CAUSAL


def test_eager_attention_keeps_its_masks():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    attend_without_masks(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", PLAIN)
def test_saved_configs_do_not_name_it(name, tmp_path):
    _, model = pair(name)
    model.save_pretrained(tmp_path)
    assert CAUSAL not in json.dumps(model.config.to_dict())
    assert not [path for path in tmp_path.glob("*.json") if CAUSAL in path.read_text()]


@pytest.mark.parametrize("name", PLAIN)
def test_the_last_layer_is_pruned_as_before(name):
    model, other = pair(name)
    assert type(fast_trunk(other)) is type(fast_trunk(model)) is not type(None)
