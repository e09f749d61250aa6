"""XLM, which counts padding tokens, reads them like other tokens: compared with a mask of ones in transformers."""

import pytest
import torch
from families_models import tiny_config, tiny_model

from megaft.models import trials
from megaft.models.hugging_face import NatsModel
from megaft.weights.loading import pretrained
from megaft.weights.loading.pretrained import load_language_model

PADDING = 2
TEXTS = {"without padding tokens": (5, 6, 7, 8, 9), "with padding tokens": (5, PADDING, 7, PADDING, 9)}


@pytest.fixture(scope="module")
def plain():
    return tiny_model(tiny_config("xlm", {"causal": True, "pad_index": PADDING}))


@pytest.fixture(scope="module")
def loaded(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("xlm")
    plain.save_pretrained(folder)
    return load_language_model(str(folder)).eval()


@pytest.mark.parametrize("text", TEXTS)
def test_nats_are_those_with_a_mask_of_ones(text, plain, loaded):
    tokens = torch.tensor([TEXTS[text]])
    logits = plain(tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1])).logits
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")
    found = NatsModel(loaded)(tokens[:, :-1], tokens[:, 1:], positions=torch.arange(tokens.numel() - 1))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)


def test_without_padding_tokens_a_mask_changes_nothing(plain, loaded):
    tokens = torch.tensor([TEXTS["without padding tokens"]])
    assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_a_later_padding_token_changes_no_earlier_state(plain, loaded):
    one, other = torch.tensor([[PADDING, 6, 7, 8, 9]]), torch.tensor([[PADDING, 6, 7, PADDING, PADDING]])
    assert torch.equal(loaded(one).logits[:, :3], loaded(other).logits[:, :3])
    assert not torch.equal(plain(one).logits[:, :3], plain(other).logits[:, :3])  # as transformers reads them


def test_new_and_loaded_models_are_taken(plain, loaded):
    for model in (loaded, pretrained.new_model(plain.config).eval()):
        trials.require_language_model(model)
        assert trials.is_causal(model)
