import json

import pytest
import tiny_models
import torch
from tiny_models import VOCAB, logits_of
from torch import nn

from megaft.base.errors import ConfigError
from megaft.config.train import LoraConfig
from megaft.models import adapters
from megaft.models.hugging_face import NatsModel
from megaft.models.loss import token_nats


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))


def adapted(model, **settings):
    adapters.add_adapters(model, LoraConfig(rank=4, **settings), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                "lora_B" in name or "lora_embedding_A" in name
            ):  # zero at first, so that training starts from the model itself
                assert not parameter.any()
                parameter.normal_(std=0.1)
    return model


TARGETS = [
    *(("gpt2", targets) for targets in ((), ("c_attn", "c_fc"), ("wte",), ("lm_head", "c_proj"), ("wte", "lm_head"))),
    *(("llama", targets) for targets in ((), ("q_proj", "down_proj"), ("embed_tokens",), ("embed_tokens", "lm_head"))),
    *(("tied llama", targets) for targets in (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head", "v_proj"))),
]


def make_model(name="gpt2"):
    return tiny_models.make_model("llama", tie_word_embeddings=True) if "tied" in name else tiny_models.make_model(name)


def adapts_tied_ends(name, targets):
    return name != "llama" and bool({"wte", "embed_tokens", "lm_head"} & {*targets})


@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_only_adapters_train(name, targets, tokens):
    model = adapted(make_model(name), target_modules=targets)
    NatsModel(model)(tokens[:, :-1], tokens[:, 1:]).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in parameter_name) == (parameter.grad is not None)
        assert parameter.grad is None or parameter.grad.any()


@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_merged_adapters_give_the_same_logits_in_a_plain_model(name, targets, tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    plain = make_model(name)
    model = adapted(make_model(name), target_modules=targets)
    logits = logits_of(model, tokens)
    assert not torch.allclose(logits, logits_of(plain, tokens), atol=1e-2)
    merged = adapters.merge_adapters(model)
    torch.testing.assert_close(logits_of(merged, tokens), logits, rtol=1e-5, atol=1e-5)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, tokens), logits_of(merged, tokens))
    is_tied = plain.config.tie_word_embeddings and not adapts_tied_ends(name, targets)
    assert loaded.config.tie_word_embeddings == is_tied
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == is_tied


@pytest.mark.parametrize(("name", "targets"), TARGETS)
def test_peft_loads_saved_adapters(name, targets, tokens, tmp_path):
    from peft import PeftModel

    model = adapted(make_model(name), target_modules=targets)
    adapters.save_adapters(model, tmp_path / "adapter", base="some/base")
    theirs = PeftModel.from_pretrained(make_model(name), tmp_path / "adapter")
    assert torch.equal(logits_of(theirs, tokens), logits_of(model, tokens))
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    )


def test_an_adapter_on_the_head_counts(tokens):
    """A new adapter is zero, so the layer is recognized by its type, not by its output."""
    model = make_model("llama")
    adapters.add_adapters(model, LoraConfig(rank=2, target_modules=("lm_head",)), seed=0)
    nats_model = NatsModel(model)
    torch.nn.init.normal_(model.get_parameter("lm_head.lora_B.default.weight"))
    nats = nats_model(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(nats, token_nats(logits_of(model, tokens[:, :-1]), tokens[:, 1:]).sum())
    nats.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_adapters_are_a_function_of_the_seed():
    def weights(seed):
        model = make_model()
        adapters.add_adapters(model, LoraConfig(rank=2), seed)
        return nn.utils.parameters_to_vector(p for p in model.parameters() if p.requires_grad)

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_target_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"^--lora.target-modules is .*no_such_layer.*$") as error:
        adapters.add_adapters(make_model(), LoraConfig(rank=2, target_modules=("no_such_layer",)), seed=0)
    assert "\n" not in str(error.value)


def test_layers_that_share_a_weight_are_refused():
    """Their adapters differ, and one weight cannot hold both; only the embedding and the output layer can be untied."""
    model = make_model("llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(ConfigError, match=r"^--lora.target-modules is .*model\.layers\.0\.mlp\.up_proj .*shared"):
        adapters.add_adapters(model, LoraConfig(rank=2, target_modules=("up_proj",)), seed=0)
    adapters.add_adapters(make_model("llama"), LoraConfig(rank=2, target_modules=("up_proj",)), seed=0)
