"""Fused activations and norms of torch, in place of those that transformers writes out in several operations.

GPT-2's GELU takes eight passes over memory forward and ten backward, and saves five tensors; torch's takes one each and
saves one. A module is replaced only if both give the same result on random input.
"""

from __future__ import annotations

from copy import copy, deepcopy
from inspect import signature
from types import MethodType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import activations

from megaft.models.half_linear import multiply_in_fp32

ACTIVATIONS = (nn.GELU(approximate="tanh"), nn.GELU(), nn.SiLU())
"""torch's fused activations."""

PROBE_WIDTH = 16


def fuse(language_model: nn.Module) -> None:
    """Use torch's fused activations and RMSNorm in a model, where they compute the same function.

    On CPUs without fast instructions for half precision, its linear layers multiply in fp32 (`multiply_in_fp32`).
    """
    for module in list(language_model.modules()):
        for name, child in module.named_children():
            if fused := fused_activation(child):
                setattr(module, name, fused)
        if is_rms_norm(module):
            module.forward = MethodType(fused_rms_norm, module)
    multiply_in_fp32(language_model)


def fused_activation(module: nn.Module) -> nn.Module | None:
    """Return torch's fused activation that equals the module's to 1e-9 in float64, None if there is none."""
    if type(module).__module__ != activations.__name__ or list(module.parameters()):
        return None
    inputs = _random(64, torch.float64) * 4
    expected = module(inputs)
    equal = (each for each in ACTIVATIONS if torch.allclose(each(inputs), expected, rtol=0, atol=1e-9))
    return deepcopy(next(equal, None))  # deep, so that layers share no hooks


def is_rms_norm(module: nn.Module) -> bool:
    """Return True if the module computes `F.rms_norm` with its weight and epsilon, tested with a random weight."""
    if "RMSNorm" not in type(module).__name__ or [*module._parameters] != ["weight"] or epsilon_of(module) is None:
        return False
    if len(signature(module.forward).parameters) != 1:  # a gate, which the layer would pass
        return False
    probe = copy(module)  # with its own weight: under ZeRO-3 the module's is empty here
    probe._parameters = {"weight": nn.Parameter(_random(PROBE_WIDTH, torch.float32), requires_grad=False)}
    inputs = _random(4 * PROBE_WIDTH, torch.float32).view(4, PROBE_WIDTH)
    try:
        expected = probe(inputs)
    except (RuntimeError, TypeError, AttributeError):  # another signature, or a width kept elsewhere
        return False
    return torch.allclose(fused_rms_norm(probe, inputs), expected, rtol=1e-6, atol=1e-6)


def epsilon_of(norm: nn.Module) -> float | None:
    """Return the constant that an RMSNorm of transformers adds to the mean square."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def fused_rms_norm(norm, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """Return weight * hidden / sqrt(mean(hidden^2) + eps), as one kernel on CUDA."""
    if hidden.device.type == "cpu" and hidden.dtype is not torch.float32:
        return type(norm).forward(norm, hidden)  # torch has no fused kernel there; its composite form is slower
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, epsilon_of(norm))


def _random(size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=dtype)
