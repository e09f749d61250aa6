"""ZeRO-3 from the first weight on: models that are built and loaded in parts, of which each rank holds its own.

A rank never has more than its part of the model and the weights of about a layer, which are gathered to be filled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from megaft import parallel
from megaft.errors import UserError


@contextmanager
def loading(engine_config: dict[str, Any]) -> Iterator[None]:
    """Let `from_pretrained` fill parts: rank 0 maps the files and sends the weights of one module at a time.

    Args:
        engine_config: What deepspeed.initialize gets. Its precision is that of the parts.

    Raises:
        UserError: On every rank what the body raises on any: the first alone sees what does not fit.
    """
    lives = HfDeepSpeedConfig(engine_config)  # transformers asks whether there is one
    plain, deepspeed.zero.Init = deepspeed.zero.Init, _Init
    error = None
    try:
        with _returning_memory():
            yield
    except UserError as caught:
        error = caught
    finally:
        deepspeed.zero.Init = plain
        del lives
    parallel.raise_together(error)


@contextmanager
def making(engine_config: dict[str, Any]) -> Iterator[None]:
    """Let `from_config` make parts of the very weights that it makes elsewhere.

    transformers' own way leaves out what a layer's constructor draws, and draws on the device and in the precision of
    the run: the same seed would give other weights than at other stages.

    Args:
        engine_config: What deepspeed.initialize gets. Its precision is that of the parts.
    """
    plain = PreTrainedModel._initialize_weights

    def gathered(self: Any, module: nn.Module, is_custom_code: bool = False) -> None:
        if not getattr(module, "_is_hf_initialized", False):
            with _whole_on_host(module):
                plain(self, module, is_custom_code)

    PreTrainedModel._initialize_weights = gathered
    try:
        with _Init(engine_config), _returning_memory():
            yield
    finally:
        PreTrainedModel._initialize_weights = plain


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's names of what mallopt sets
WHILE_BUILDING, AFTERWARDS = (
    2**20,
    32 * 2**20,
)  # bytes; malloc comes to the second by itself, and then keeps larger ones


@contextmanager
def _returning_memory() -> Iterator[None]:
    """Let a freed weight go back to the system at once.

    Parts that stay lie among whole weights that do not, and holes between them are lost: the 2.5 B shape held 14 GB
    on two CPU ranks where its parts are 5.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # glibc's alone
    mallopt(MMAP_THRESHOLD, WHILE_BUILDING)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, AFTERWARDS)
        mallopt(TRIM_THRESHOLD, 2 * AFTERWARDS)


class _Init(deepspeed.zero.Init):
    """ZeRO-3's construction, but tensors are made as ever, in fp32 on the host; weights are rounded when they are cut.

    DeepSpeed's own makes all of them in the precision of the run, buffers too, which must stay in fp32 there.
    """

    def __init__(self, config_dict_or_path: dict[str, Any]):
        super().__init__(config_dict_or_path=config_dict_or_path, tensor_overrides=[])

    def _zero_init_param(self, param: Any) -> None:
        param.data = param.data.to(self.dtype)
        super()._zero_init_param(param)

    def _post_init_method(self, module: nn.Module) -> None:
        super()._post_init_method(module)
        for buffer in module.buffers(recurse=False):  # the engine moves none of a model in parts
            buffer.data = buffer.data.to(self.local_device)


@contextmanager
def _whole_on_host(module: nn.Module) -> Iterator[None]:
    """Gather what a module may initialise, its own parameters and its children's, to be overwritten in fp32."""
    parameters = [one for part in (module, *module.children()) for one in part.parameters(recurse=False)]
    parts = [(one, one.device, one.dtype) for one in dict.fromkeys(parameters) if hasattr(one, "ds_id")]
    with deepspeed.zero.GatheredParameters([one for one, *_ in parts], modifier_rank=0):
        for parameter, *_ in parts:
            parameter.data = parameter.data.to("cpu", torch.float32)
        yield
        for parameter, device, dtype in parts:
            parameter.data = parameter.data.to(device, dtype)
