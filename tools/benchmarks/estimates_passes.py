"""Memory of one forward and backward pass on fake tensors, by torch's memory tracker: any size, in seconds.

Fake tensors are on the CPU and run the operations of CUDA (fake_cuda.py).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import fake_cuda
import torch
from estimates_cases import Passing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from megaft.base import parallel
from megaft.models import hugging_face
from megaft.weights.loading import pretrained
from megaft.weights.presets import PRESETS


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
        with FakeTensorMode(), fake_cuda.kernels_of_cuda(), _attention_of_megatron():
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
        fake_cuda.fuse(language_model)
        model = hugging_face.NatsModel(language_model)
    fake_cuda.round_parameters(model, getattr(torch, case.dtype))
    return model.train()


def _attention_of_megatron() -> AbstractContextManager[Any]:
    from megaft.models.megatron import Attention

    return patch.object(Attention, "_dropped", lambda self, attend, device: attend())
