"""Half-precision layers on CPUs without instructions for them: products in fp32, rounded once."""

from copy import deepcopy

import pytest
import torch
from tiny_models import make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from megaft.base import half_precision
from megaft.models.attention import attend_without_masks
from megaft.models.half_linear import multiply_in_fp32
from megaft.models.linear_nats import LinearNats
from megaft.models.products import fp32_logits

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def old_cpu(monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", tuple(HALF))


def layer_of(kind, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def output_and_gradients(layer, states):
    states = states.clone().requires_grad_()
    output = layer(states)
    (output.float() * torch.arange(output.shape[-1])).sum().backward()
    return output.detach(), states.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("dtype", HALF)
def test_outputs_and_gradients_are_fp32_ones_rounded_once(kind, dtype):
    layer, states = layer_of(kind, dtype), torch.randn(2, 5, 24).to(dtype)
    expected = output_and_gradients(deepcopy(layer).float(), states.float())
    multiply_in_fp32(model := nn.Sequential(layer))
    computed = output_and_gradients(model[0], states)
    for ours, fp32 in zip(computed, expected, strict=True):
        assert torch.equal(ours, fp32.to(dtype))


def test_frozen_weights_get_no_gradient():
    layer = layer_of(nn.Linear, torch.bfloat16).requires_grad_(False)
    multiply_in_fp32(nn.Sequential(layer))
    states = torch.randn(3, 24, dtype=torch.bfloat16, requires_grad=True)
    layer(states).sum().backward()
    assert states.grad is not None
    assert layer.weight.grad is None


def test_only_inputs_in_half_precision_are_saved():
    layer = layer_of(nn.Linear, torch.bfloat16)
    multiply_in_fp32(nn.Sequential(layer))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 24, dtype=torch.bfloat16, requires_grad=True))
    assert [tensor.dtype for tensor in saved] == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_fp32_layers_and_fast_cpus_compute_as_before(kind, monkeypatch):
    layer, states = layer_of(kind, torch.float32), torch.randn(3, 24)
    multiply_in_fp32(nn.Sequential(layer))
    assert torch.equal(layer(states), kind.forward(layer, states))
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", ())
    layer, states = layer.bfloat16(), states.bfloat16()
    assert torch.equal(layer(states), kind.forward(layer, states))


def test_mixed_precisions_are_refused_as_by_torch():
    layer = layer_of(nn.Linear, torch.float32)
    multiply_in_fp32(nn.Sequential(layer))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 24, dtype=torch.bfloat16))


def test_a_single_row():
    layer = layer_of(nn.Linear, torch.bfloat16)
    multiply_in_fp32(nn.Sequential(layer))
    layer(torch.ones(24, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones_like(layer.weight))


class Products(TorchDispatchMode):
    """The dtypes of matrix products and attention."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "bmm", "_linear_pointwise") or name.startswith("_scaled_dot_product"):
            self.dtypes.setdefault(name, set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_product_of_a_model_is_in_fp32(family):
    model = make_model(family).eval()
    multiply_in_fp32(model)
    attend_without_masks(model)
    with Products() as products:
        logits = model.bfloat16()(torch.arange(12).view(1, 12)).logits
        logits.float().sum().backward()
    assert logits.dtype is torch.bfloat16
    assert len(products.dtypes) >= 3
    assert set().union(*products.dtypes.values()) == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
def test_logits_are_not_rounded_to_half_precision(dtype):
    hidden, weight = torch.randn(7, 24).to(dtype), torch.randn(50, 24).to(dtype)
    expected = hidden.double() @ weight.double().T
    torch.testing.assert_close(fp32_logits(hidden, weight, None).double(), expected, rtol=1e-6, atol=1e-5)


def test_the_loss_and_its_gradients_are_those_of_fp32():
    hidden, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((7, 24), (50, 24), (50,)))
    labels = torch.arange(7)

    def computed(dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
        nats = LinearNats.apply(*inputs, labels)
        nats.backward()
        return nats.detach(), [tensor.grad for tensor in inputs]

    expected, gradients = computed(torch.float32)
    nats, half_gradients = computed(torch.bfloat16)
    assert nats == expected
    for ours, fp32 in zip(half_gradients, gradients, strict=True):
        assert torch.equal(ours, fp32.bfloat16())
