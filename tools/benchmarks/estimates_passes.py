"""Memory of one forward and backward pass on fake tensors, by torch's memory tracker: any size, in seconds.

Fake tensors are on the CPU, since torch built without CUDA has no autograd for others. Operations with other kernels on
CUDA are therefore replaced: fused attention with dropout, dropout with byte masks, fused RMSNorm (LayerNorm saves the
same tensors). Logits are chunked as on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from estimates_cases import Passing
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from megaft.base import parallel
from megaft.commands.estimate.presets import PRESETS
from megaft.models import hugging_face, loss, trials
from megaft.weights.loading import pretrained


@dataclass(frozen=True, slots=True)
class Peak:
    """Memory of a forward and backward pass, in bytes."""

    weights: int
    total: int


def measure(case: Passing) -> Peak:
    """Run a model of fake tensors forward and backward; return the memory that torch's tracker recorded."""
    if case.tensor_parallel_size:
        parallel.join_fake_group(case.tensor_parallel_size)
        parallel.start_tensor_parallelism(case.tensor_parallel_size)
    try:
        with FakeTensorMode(), _kernels_of_cuda():
            model = _model(case)
            tokens = torch.zeros(case.micro_batch_size, case.context_length, dtype=torch.long)
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                model(tokens, tokens).backward()
            peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
            weights = {id(one): one.nbytes for one in model.parameters()}
            return Peak(sum(weights.values()), peak["Total"])
    finally:
        parallel.leave()


def _model(case: Passing) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(**PRESETS[case.model])
    pretrained.set_dropout(config, case.dropout)
    if case.tensor_parallel_size:
        from megaft.models import megatron

        model: nn.Module = megatron.MegatronNats(megatron.MegatronModel(config, recompute=case.is_recomputed))
    else:
        language_model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        if case.is_recomputed:
            language_model.gradient_checkpointing_enable({"use_reentrant": False})
        model = hugging_face.NatsModel(language_model)
    _round(model, getattr(torch, case.dtype))
    return model.train()


def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert a model like `model.to(dtype)`, which does not support fake tensors."""
    rounded: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(parameter.detach().to(dtype))
                module._parameters[name] = rounded.setdefault(id(parameter), new)


@contextmanager
def _kernels_of_cuda() -> Iterator[None]:
    from megaft.models.megatron import Attention

    with (
        patch.object(F, "scaled_dot_product_attention", _attend),
        patch.object(F, "dropout", _drop),
        patch.object(F, "rms_norm", lambda states, shape, weight=None, eps=None: F.layer_norm(states, shape, weight)),
        patch.object(Attention, "_dropped", lambda self, attend, device: attend()),
        patch.object(trials, "head_is_linear", lambda model, trial_model=None: True),
        patch("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None),
        patch.dict(loss.CHUNK_BYTES, cpu=loss.CHUNK_BYTES["cuda"]),
    ):
        yield


def _attend(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None, **_: Any
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)[0]


def _drop(states: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.ops.aten.native_dropout(states, p, True)[0] if training and p else states
