"""Loaded weights equal the file's, whatever the family's initialization does."""

import pytest
import torch
from families_models import tiny_config, tiny_model
from safetensors.torch import load_file

from megaft.weights.loading.pretrained import load_language_model


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param("youtu", "model.embed_tokens.weight", id="youtu, whose padding row transformers sets to zero"),
        pytest.param("llama", "model.embed_tokens.weight", id="llama"),
    ],
)
def test_a_loaded_embedding_is_the_stored_one(family, name, tmp_path):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")[name]
    assert stored[0].abs().min() > 0
    assert torch.equal(load_language_model(str(tmp_path)).get_parameter(name), stored)


@pytest.mark.parametrize(
    ("family", "frozen"),
    [
        pytest.param("roformer", ["roformer.encoder.embed_positions.weight"], id="sinusoidal positions"),
        pytest.param("afmoe", ["model.layers.1.mlp.expert_bias"], id="a router's bias"),
        pytest.param("llama", [], id="none"),
    ],
)
def test_what_the_family_freezes_is_frozen_when_loaded_too(family, frozen, tmp_path):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    model = load_language_model(str(tmp_path))
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == frozen


def test_buffers_that_no_file_stores_are_initialized(tmp_path):
    model = tiny_model(tiny_config("llama"))
    model.save_pretrained(tmp_path)
    assert torch.equal(load_language_model(str(tmp_path)).model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
