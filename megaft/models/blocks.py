"""Transformer blocks: the repeated layers of a model."""

from __future__ import annotations

from deepspeed.utils import set_z3_leaf_module
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformers model, in order; none if its family is not built of them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def gather_whole_blocks(model: nn.Module) -> None:
    """Make ZeRO-3 gather and release all parameters of a block together, instead of layer by layer.

    A block then has one hook instead of a dozen, which take longer than the GPU's kernels; DeepSpeed calls such a
    module a leaf. Call this before deepspeed.initialize. Blocks with frozen parameters, as with LoRA, are left as they
    are: the backward pass of such a leaf fails in DeepSpeed 0.19.8, which has released the parameters by then.
    """
    for block in blocks_of(model):
        if all(parameter.requires_grad for parameter in block.parameters()):
            set_z3_leaf_module(block, True)
