"""Linear layers of half-precision models on CPUs that only multiply fp32 matrices fast.

torch multiplies bf16 and fp16 matrices there up to 70 times slower than fp32 ones (`megaft.base.half_precision`). A
layer converts its operands to fp32 and rounds the product once; activations, weights and gradients stay in half
precision.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from megaft.models.products import needs_fp32


def multiply_in_fp32(model: nn.Module) -> None:
    """Let the linear layers of a model, including GPT-2's Conv1D, multiply in fp32 where `needs_fp32` says so."""
    for module in model.modules():
        if type(module) in (nn.Linear, Conv1D):
            module.forward = MethodType(linear, module)


def linear(layer, input: Tensor) -> Tensor:
    """Return the layer's output for `input`; compiled blocks trace it, hence no shapes here."""
    if not needs_fp32(input) or layer.weight.dtype is not input.dtype:
        return type(layer).forward(layer, input)
    return Fp32Linear.apply(input, layer.weight, layer.bias, type(layer) is Conv1D)


class Fp32Linear(torch.autograd.Function):
    """states @ weight.T + bias, computed in fp32 and rounded to the dtype of the states, like its gradients."""

    @staticmethod
    def forward(
        ctx,
        states: Float[Tensor, "*rows in"],
        weight: Float[Tensor, "out in"] | Float[Tensor, "in out"],
        bias: Float[Tensor, " out"] | None,
        is_transposed: bool,
    ) -> Float[Tensor, "*rows out"]:
        """Return the product; the weight of a Conv1D `is_transposed`."""
        ctx.save_for_backward(states, weight)
        ctx.is_transposed = is_transposed
        matrix = _matrix(weight, is_transposed)
        return F.linear(states.float(), matrix, None if bias is None else bias.float()).to(states.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Float[Tensor, "*rows out"]):
        """Return the gradients of the states, the weight and the bias that are needed."""
        states, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].float()
        grad_states = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_states = (grad_output @ _matrix(weight, ctx.is_transposed)).to(states.dtype)
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[1]:
            inputs = states.reshape(-1, states.shape[-1]).float()
            grad_weight = (inputs.T @ rows if ctx.is_transposed else rows.T @ inputs).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_states, grad_weight, grad_bias, None


def _matrix(weight: Tensor, is_transposed: bool) -> Float[Tensor, "out in"]:
    return weight.float().T if is_transposed else weight.float()
