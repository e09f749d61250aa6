"""Fused activations and norms equal those that transformers writes out."""

from copy import deepcopy

import pytest
import torch
from tiny_models import make_model
from torch import nn
from transformers import activations
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from megaft.models.fused import fuse, fused_activation, is_rms_norm

FUSED = {"gelu_new": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh", "gelu_python": "none"}
OTHERS = ("quick_gelu", "gelu_10", "relu2", "laplace", "linear", "sqrtsoftplus")


@pytest.mark.parametrize("name", FUSED)
def test_a_written_out_gelu_is_replaced(name):
    fused = fused_activation(activations.ACT2FN[name])
    assert isinstance(fused, nn.GELU)
    assert fused.approximate == FUSED[name]


def test_layers_share_no_hooks():
    first, second = (fused_activation(activations.ACT2FN["gelu_new"]) for _ in range(2))
    first.register_forward_pre_hook(lambda *_: None)
    assert not second._forward_pre_hooks
    assert not fused_activation(activations.ACT2FN["gelu_new"])._forward_pre_hooks


def test_a_norm_with_a_gate_stays_as_it_is():
    assert not is_rms_norm(FalconH1RMSNormGated(16))


@pytest.mark.parametrize("name", OTHERS)
def test_another_function_is_kept(name):
    assert fused_activation(activations.ACT2FN[name]) is None


def test_only_a_norm_that_computes_the_same_is_replaced():
    assert is_rms_norm(LlamaRMSNorm(8))
    assert not is_rms_norm(Gemma2RMSNorm(8))  # multiplies by 1 + weight
    assert not is_rms_norm(nn.LayerNorm(8))


def loss_and_gradients(model):
    tokens = torch.arange(24).view(2, 12) % model.config.vocab_size
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2 with capped logits"])
def test_losses_and_gradients_are_equal(family):
    model = make_model(family).eval()
    fused = deepcopy(model)
    fuse(fused)
    expected, gradients = loss_and_gradients(model)
    loss, fused_gradients = loss_and_gradients(fused)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-5, atol=1e-6)


def saved_bytes(model):
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.zeros(4, 16, model.in_features)).sum()
    assert loss.requires_grad
    return sum(sizes.values())


def test_a_fused_activation_saves_its_input_only():
    class Mlp(nn.Sequential):
        in_features = 32

    model = Mlp(nn.Linear(32, 64), activations.ACT2FN["gelu_new"], nn.Linear(64, 32))
    written_out = saved_bytes(model)
    fuse(model)
    hidden = 4 * 16 * 64 * 4
    assert written_out - saved_bytes(model) >= 3 * hidden


def test_a_copy_of_a_fused_model_uses_its_own_norms():
    model = make_model("llama")
    fuse(model)
    copied = deepcopy(model)
    with torch.no_grad():
        copied.model.norm.weight.fill_(2.0)
    states = torch.randn(1, 3, model.config.hidden_size)
    torch.testing.assert_close(
        copied.model.norm(states), 2 * states / (states.pow(2).mean(-1, True) + 1e-6).sqrt(), rtol=1e-4, atol=1e-5
    )
