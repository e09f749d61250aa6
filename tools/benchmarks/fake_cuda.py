"""CUDA's kernels for fake CPU tensors, to measure memory and count kernels without a GPU.

torch built without CUDA has autograd only for fake tensors on the CPU. Operations that run other kernels on CUDA are
therefore replaced: attention, dropout with byte masks, RMSNorm, and the padded products and compiled loss of the output
layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from megaft.base import hardware
from megaft.models import fused, linear_nats, products, trials


@contextmanager
def kernels_of_cuda() -> Iterator[None]:
    """Run a model of fake CPU tensors with the operations that CUDA runs."""
    with (
        patch.object(F, "scaled_dot_product_attention", _attend),
        patch.object(F, "dropout", _drop),
        patch.object(F, "rms_norm", _rms_norm),
        _output_layer_of_cuda(),
        patch.object(fused, "fused_rms_norm", _fused_rms_norm),
        patch.object(linear_nats, "_compiled", lambda: nats_and_grad_logits),
        patch.object(trials, "head_is_linear", lambda model, trial_model=None: True),
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None),
    ):
        yield


@contextmanager
def memory_of_the_head() -> Iterator[None]:
    """Allocate in the output layer what CUDA allocates, on real CPU tensors, without computing anything."""
    with (
        _output_layer_of_cuda(),
        patch.object(linear_nats, "fp32_logits", lambda hidden, weight, bias: torch.zeros(len(hidden), len(weight))),
        patch.object(linear_nats, "add_product", lambda total, left, right: None),
        patch.object(linear_nats, "_compiled", lambda: _nats_and_zeros),
    ):
        yield


@contextmanager
def _output_layer_of_cuda() -> Iterator[None]:
    """Take CUDA's branches and chunks in the output layer."""
    with (
        patch.object(Tensor, "logsumexp", _logsumexp),
        patch.object(products, "is_on_cuda", lambda tensor: True),
        patch.dict(hardware.CHUNK_BYTES, cpu=hardware.CHUNK_BYTES["cuda"]),
        patch.dict(hardware.CHUNK_ROWS_MULTIPLE, cpu=hardware.CHUNK_ROWS_MULTIPLE["cuda"]),
    ):
        yield


def _nats_and_zeros(logits: Tensor, labels: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return logits.new_zeros(()), torch.zeros_like(logits, dtype=dtype)


def fuse(language_model: nn.Module) -> None:
    """Fuse operations of a model of fake tensors, after comparing them on real ones."""
    with unset_fake_temporarily():
        fused.fuse(language_model)


def round_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model like `model.to(dtype)`, which does not support fake tensors."""
    rounded: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(parameter.detach().to(dtype))
                module._parameters[name] = rounded.setdefault(id(parameter), new)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None, **_: Any
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[0]


def _drop(states: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.ops.aten.native_dropout(states, p, True)[0] if training and p else states


def _logsumexp(logits: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    """Allocate what torch's kernels do: one more tensor of the input's size."""
    largest = logits.amax(dim, keepdim=True)
    total = (logits - largest).exp_().sum(dim, keepdim=True).log_().add_(largest)
    return total if keepdim else total.squeeze(dim)


def _fused_rms_norm(norm: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, fused.epsilon_of(norm))


rms_norm_of_torch = F.rms_norm


def _rms_norm(states: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is None or not isinstance(states, FakeTensor):
        return rms_norm_of_torch(states, shape, weight, eps)
    return _RmsNorm.apply(states, weight)


class _RmsNorm(torch.autograd.Function):
    """RMSNorm with the saved tensors of CUDA's kernel: its input, its weight and 1 / root mean square."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        output, scales = rms_norm(states, weight)
        ctx.save_for_backward(states, weight, scales)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_backward(gradients[0], *ctx.saved_tensors)


def _missing(*_: Any) -> Any:
    raise NotImplementedError("only fake tensors run this operation")


@torch.library.custom_op("megaft_fake::rms_norm", mutates_args=())
def rms_norm(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for CUDA's RMSNorm."""
    return _missing(states, weight)


@rms_norm.register_fake
def _(states: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states), states.new_empty((*states.shape[:-1], 1), dtype=torch.float32)


@torch.library.custom_op("megaft_fake::rms_norm_backward", mutates_args=())
def rms_norm_backward(gradient: Tensor, states: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Stand for the backward pass of CUDA's RMSNorm."""
    return _missing(gradient, states, weight, scales)


@rms_norm_backward.register_fake
def _(gradient: Tensor, states: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(states), torch.empty_like(weight)


@torch.library.custom_op("megaft_fake::nats_and_grad_logits", mutates_args=())
def nats_and_grad_logits(logits: Tensor, labels: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stand for the compiled loss and its gradient."""
    return _missing(logits, labels, size, dtype)


@nats_and_grad_logits.register_fake
def _(logits: Tensor, labels: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return logits.new_empty(()), torch.empty_like(logits, dtype=dtype)
