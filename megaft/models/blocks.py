"""Blocks of a model: the equal layers of which transformers builds it."""

from __future__ import annotations

from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model of transformers, in order; none if its family has no such layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def gather_whole_blocks(model: nn.Module) -> None:
    """Make ZeRO-3 gather and release a block's parameters together, instead of each layer's in it.

    A block then has one hook instead of a dozen, which take longer than the kernels of a GPU; DeepSpeed calls such a
    module a leaf. Call it before deepspeed.initialize. Blocks with frozen parameters, as LoRA has, stay as they are:
    as leaves, their backward pass fails in DeepSpeed 0.19.8, which has released the parameters by then.
    """
    for block in blocks_of(model):
        if all(parameter.requires_grad for parameter in block.parameters()):
            set_z3_leaf_module(block, True)
