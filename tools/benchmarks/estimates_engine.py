"""Memory of a real DeepSpeed engine on CPU tensors, as rank 0 of N, counted byte by byte.

The other ranks do not exist: torch's fake process group stands in for them, so one process shows the memory of each
ZeRO stage on 1, 2 or 8 ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import fake_cuda
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megaft.base import parallel
from megaft.checkpoint.engine_state import inner_optimizer
from megaft.commands.estimate.recipe import Recipe
from megaft.models.blocks import gather_whole_blocks
from megaft.models.fused import fuse
from megaft.models.hugging_face import NatsModel
from megaft.run.engine import build_engine


class Counter(TorchDispatchMode):
    """Counts the bytes of the live output tensors of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its outputs."""
        found = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, found)
        return found

    def _see(self, tensor: Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            weakref.finalize(storage, self._forget, storage._cdata)
        self.now += storage.nbytes() - self._known.get(storage._cdata, 0)
        self._known[storage._cdata] = storage.nbytes()
        self.most = max(self.most, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


@dataclass(frozen=True, slots=True)
class Held:
    """Memory of an engine, in bytes."""

    weights: int
    master_weights: int
    optimizer: int
    gradients: int
    """After the last backward pass of a step."""
    peak: int
    """Of a whole step."""


def measure(recipe: Recipe, steps: int = 2) -> Held:
    """Build a recipe's engine as rank 0, train a few steps and return its memory."""
    accumulation = recipe.setup().gradient_accumulation_steps
    try:
        parallel.join(parallel.join_fake_group(recipe.world_size))
        if recipe.is_megatron:
            parallel.start_tensor_parallelism(recipe.tensor_parallel_size)
        counter = Counter()
        with counter, fake_cuda.memory_of_the_head():
            engine = build(recipe)
            for _ in range(steps - 1):
                train_step(engine, recipe, accumulation)
            counter.most = 0
            gradients = train_step(engine, recipe, accumulation)
        return held(engine, gradients, counter.most)
    finally:
        parallel.leave()
        _forget_groups()


def build(recipe: Recipe) -> Any:
    """Return DeepSpeed's engine of a new model, built as in training."""
    _allow_fp16()
    return build_engine(_model(recipe), recipe.setup(), torch.device("cpu"))


def _model(recipe: Recipe) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**transformers_config(recipe))
    if not recipe.is_megatron:
        language_model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        fuse(language_model)
        if recipe.setup().zero_stage == 3:
            gather_whole_blocks(language_model)
        return NatsModel(language_model)
    from megaft.models.megatron import MegatronModel, MegatronNats

    model = MegatronNats(MegatronModel(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def _forget_groups() -> None:
    """Clear the process groups that DeepSpeed caches."""
    from deepspeed.utils import groups

    for name, value in vars(groups).items():
        if name.startswith("_") and name.isupper() and not isinstance(value, str):
            setattr(groups, name, {} if isinstance(value, dict) else None)


def transformers_config(recipe: Recipe) -> dict[str, Any]:
    """Return transformers' configuration of a recipe's GPT-2, without dropout."""
    dims = recipe.dims
    assert not dims.is_gated
    sizes = {"n_embd": dims.width, "n_layer": dims.num_layers, "n_head": dims.num_heads}
    sizes |= {"vocab_size": dims.vocab_size, "n_positions": dims.num_positions, "bos_token_id": 0, "eos_token_id": 0}
    return {"model_type": "gpt2", **sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    accelerator.is_fp16_supported = lambda: True  # torch computes it on CPUs, slowly


def train_step(engine: Any, recipe: Recipe, accumulation: int) -> int:
    """Train one step; return the bytes of gradients before the optimizer step."""
    tokens = torch.zeros(engine.train_micro_batch_size_per_gpu(), recipe.context_length, dtype=torch.long)
    found = 0
    for _ in range(accumulation):
        engine.backward(engine(tokens, tokens) / tokens.numel())
        found = bytes_of(_gradients(engine))
        engine.step()
    return found


def _gradients(engine: Any) -> Iterator[Tensor]:
    zero = engine.optimizer
    in_model = [getattr(one, name, None) for one in engine.module.parameters() for name in ("grad", "grad_accum")]
    of_engine = [getattr(zero, name, None) for name in ("grads_in_partition", "grad_partitions_flat_buffer")]
    averaged = [part for parts in (getattr(zero, "averaged_gradients", None) or {}).values() for part in parts or []]
    for gradient in (*in_model, *of_engine, *averaged, *getattr(zero, "fp32_groups_gradients_flat", [])):
        # What lies in the bucket has been reduced from there.
        bucket = engine.zero_reduce_bucket_size() * 4
        if gradient is not None and gradient.untyped_storage().nbytes() != bucket:
            yield gradient


def held(engine: Any, gradients: int, peak: int) -> Held:
    """Return the bytes of an engine's tensors, between steps."""
    optimizer = inner_optimizer(engine)
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stepped += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])
    weights = [*engine.module.parameters(), *getattr(engine.optimizer, "fp16_partitioned_groups_flat", [])]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return Held(
        weights=bytes_of(weights),
        master_weights=bytes_of([*weights, *stepped]) - bytes_of(weights),
        optimizer=bytes_of(moments),
        gradients=gradients,
        peak=peak,
    )


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of these tensors, counting shared storage once."""
    storages = {storage._cdata: storage.nbytes() for tensor in tensors if (storage := tensor.untyped_storage())}
    return sum(storages.values())
