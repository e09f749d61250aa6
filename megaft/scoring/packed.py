"""Linear layers for inference on CPUs, with weights packed in oneDNN's layout.

torch multiplies float32 matrices on CPUs with MKL, which does not use AVX-512 on AMD. oneDNN's kernels for packed
matrices are up to twice as fast there, in the same precision. TorchInductor does the same with frozen weights.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ROWS = 2048
"""Batch rows that the layout is optimized for; constant, so that every rank computes the same bits."""


class PackedLinear(nn.Module):
    """x @ weight.T + bias, without gradients."""

    def __init__(self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, states: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """Return the product."""
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")


def pack_linears(model: nn.Module) -> None:
    """Replace every linear layer, including GPT-2's transposed Conv1D layers, by a packed one."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child.weight, child.bias))
            elif type(child) is Conv1D:
                setattr(module, name, PackedLinear(child.weight.T, child.bias))
