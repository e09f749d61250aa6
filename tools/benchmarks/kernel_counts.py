"""Count the GPU kernels of one micro-batch without a GPU, and predict its time on an H100; write docs/performance.md.

    python tools/benchmarks/kernel_counts.py

megaft's NatsModel runs forward and backward on fake tensors of the full size (fake_cuda.py), and a dispatch mode counts
the kernels, bytes and FLOPs of every operation. The predicted time of a kernel is that of its FLOPs or its bytes,
whichever is longer (a roofline), and never below the shortest time of a kernel.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fake_cuda
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaft.base import hardware
from megaft.commands.estimate.roofline import SUSTAINED_COMPUTE, SUSTAINED_MEMORY, product_share
from megaft.models import head as head_module
from megaft.models import hugging_face
from megaft.models.hugging_face import NatsModel
from megaft.weights.presets import PRESETS

ROOT = Path(__file__).parents[2]
PRODUCT_FLOPS, MEMORY_BYTES, SHORTEST_KERNEL = 798e12, 2.76e12, 2.2e-6
"""Of one H100: FLOP/s of a large bf16 product, bytes/s of an elementwise kernel, seconds of the shortest kernel."""
ATTENTION_FLOPS = {"forward": 300e12, "backward": 230e12}
"""cuDNN's causal attention at 1,024 tokens and a head width of 64."""
MISALIGNED = 0.45
"""Rate of a product with a leading dimension that is not a multiple of 8, relative to an aligned one."""
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted", "detach"}
KERNELS = {"native_layer_norm_backward": 3, "rms_norm_backward": 2, "embedding_dense_backward": 8, "slice_backward": 2}
KERNELS |= {"nats_and_grad_logits": 3, "_scaled_dot_product_flash_attention_for_cpu_backward": 3}
"""Number of CUDA kernels of operations that run more than one."""
CATEGORIES = {"norm": "norms", "embedding": "embeddings", "dropout": "dropout", "sum": "sums (gradients of biases)"}
CATEGORIES |= {"nats_and_grad_logits": "loss and its gradient", "gelu": "activations", "silu": "activations"}
CATEGORIES |= {"index_add": "embeddings"}


@dataclass(slots=True)
class Totals:
    """Sums over kernels."""

    kernels: int = 0
    bytes: float = 0
    flops: float = 0
    compute_seconds: float = 0
    """Predicted time of products and attention."""
    memory_seconds: float = 0
    """Predicted time of all other kernels."""

    def __iadd__(self, other: Totals) -> Totals:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def seconds(self, *, sustained: bool = False) -> float:
        """Return the predicted time, at the rates of a short burst or of hours."""
        compute, memory = (SUSTAINED_COMPUTE, SUSTAINED_MEMORY) if sustained else (1, 1)
        return self.compute_seconds / compute + self.memory_seconds / memory


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product [m, k] @ [k, n]."""

    m: int
    n: int
    k: int
    leading_dimensions: tuple[int, ...]
    is_in_head: bool

    @property
    def is_aligned(self) -> bool:
        """True if tensor cores can load both matrices and store the result in whole 16-byte units."""
        return all(size % 8 == 0 for size in self.leading_dimensions)

    @property
    def rate(self) -> float:
        """Predicted FLOP/s."""
        share = product_share(self.m, self.n, self.k)
        return PRODUCT_FLOPS * share * (1 if self.is_aligned else MISALIGNED)


@dataclass
class KernelCounter(TorchDispatchMode):
    """Counts the kernels that the operations of fake tensors would run on CUDA."""

    categories: dict[str, Totals] = field(default_factory=lambda: defaultdict(Totals))
    products: list[Product] = field(default_factory=list)
    chunk_rows: list[int] = field(default_factory=list)
    """Rows of each chunk of logits."""
    saved_bytes: int = 0
    is_in_head: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def totals(self) -> Totals:
        """Sums over all categories."""
        total = Totals()
        for each in self.categories.values():
            total += each
        return total

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count its kernels."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        is_view = not func._schema.is_mutable and all(out.untyped_storage()._cdata in storages for out in outputs)
        if outputs and name not in ALLOCATIONS and not is_view and not func._schema.name.startswith("prim"):
            self.count_operation(name, inputs, outputs)
        return result

    def count_operation(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Count the kernels of one operation."""
        if name in ("mm", "addmm"):
            return self._count_product(inputs, outputs[0])
        if name.startswith("_scaled_dot_product"):
            return self._count_attention(name, inputs, outputs)
        if name == "nats_and_grad_logits":
            self.chunk_rows.append(len(inputs[0]))
        kernels, moved = KERNELS.get(name, 1), bytes_moved(name, inputs, outputs)
        seconds = max(moved / MEMORY_BYTES, kernels * SHORTEST_KERNEL)
        self.categories[self._category(name)] += Totals(kernels, moved, 0, 0, seconds)
        return None

    def _category(self, name: str) -> str:
        if self.is_in_head:
            return CATEGORIES.get(name, "head, all else")
        return next((CATEGORIES[part] for part in CATEGORIES if part in name), "other elementwise")

    def _count_product(self, inputs: list[Tensor], output: Tensor) -> None:
        left, right = inputs[-2:]
        leading = tuple(map(leading_dimension, (left, right, output)))
        product = Product(left.shape[0], right.shape[1], left.shape[1], leading, self.is_in_head)
        self.products.append(product)
        flops, moved = 2.0 * product.m * product.n * product.k, bytes_of(inputs) + bytes_of([output])
        seconds = max(flops / product.rate, moved / MEMORY_BYTES, SHORTEST_KERNEL)
        name = "head, products" if self.is_in_head else "products"
        self.categories[name] += Totals(1, moved, flops, seconds, 0)

    def _count_attention(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        is_backward = name.endswith("backward")
        batch, heads, time, width = inputs[1 if is_backward else 0].shape
        flops = (2.5 if is_backward else 1) * 2.0 * batch * heads * time * time * width  # causal: half of each matrix
        seconds = flops / ATTENTION_FLOPS["backward" if is_backward else "forward"]
        moved = bytes_of(inputs) + bytes_of(outputs)
        self.categories["attention"] += Totals(KERNELS.get(name, 1), moved, flops, seconds, 0)


def bytes_moved(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Return the bytes that an operation's kernels read and write."""
    read, written = bytes_of(inputs), bytes_of(outputs)
    if name in (
        "zeros",
        "zeros_like",
        "new_zeros",
        "ones",
        "ones_like",
        "full",
        "full_like",
        "arange",
        "zero_",
        "fill_",
    ):
        return written
    if name in ("native_layer_norm_backward", "rms_norm_backward"):
        return read + written + 2 * bytes_of(inputs[:1])  # a second pass for the gradients of the weight and bias
    if name == "embedding":
        return 2 * written
    if name == "embedding_dense_backward":
        return 2 * bytes_of(inputs[:1]) + 2 * written
    if name == "index_add_":
        return 3 * bytes_of(inputs[2:])  # the rows, and those that they are added to
    if name == "nats_and_grad_logits":
        return 2 * bytes_of(inputs[:1]) + written  # log-sum-exp, then the gradient
    if name in ("gather", "scatter_add_"):
        return 64 * inputs[1].numel()  # a sector of memory for each token
    return bytes_of(inputs[:2]) if name == "copy_" else read + written


def bytes_of(tensors: list[Tensor]) -> float:
    """Return the bytes of tensors, without elements that a broadcast repeats."""
    return float(sum(min(each.numel() * each.element_size(), each.untyped_storage().nbytes()) for each in tensors))


def leading_dimension(matrix: Tensor) -> int:
    """Return the elements from one row to the next, or from one column to the next of a transposed matrix."""
    return matrix.stride(0) if matrix.stride(1) == 1 else matrix.stride(1)


def count(
    model: str,
    micro_batch_size: int = 8,
    context_length: int = 1024,
    *,
    is_fused: bool = True,
    is_new_head: bool = True,
    num_layers: int | None = None,
) -> KernelCounter:
    """Count one micro-batch of a preset in bf16 without dropout, with the operations that megaft runs on CUDA."""
    with FakeTensorMode(), fake_cuda.kernels_of_cuda(), ExitStack() as stack:
        if not is_new_head:
            stack.enter_context(old_head())
        nats_model = build(model, is_fused, num_layers)
        tokens = torch.zeros(micro_batch_size, context_length, dtype=torch.long)
        counter = KernelCounter()
        watch_head(nats_model, counter)
        with counter, saving(nats_model, counter):
            nats_model(tokens, tokens).backward()
    return counter


def build(model: str, is_fused: bool, num_layers: int | None = None) -> NatsModel:
    """Return a model of fake bf16 tensors, with the preset's number of layers or another."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from megaft.weights.loading import pretrained

    config: Any = AutoConfig.for_model(**PRESETS[model])
    pretrained.set_dropout(config, 0.0)
    if num_layers is not None:
        config.num_hidden_layers = num_layers
    language_model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if is_fused:
        fake_cuda.fuse(language_model)
    nats_model = NatsModel(language_model)
    fake_cuda.round_parameters(nats_model, torch.bfloat16)
    return nats_model.train()


def watch_head(model: NatsModel, counter: KernelCounter) -> None:
    """Tell the counter when the output layer runs."""
    assert model.head is not None
    model.head.register_forward_pre_hook(lambda *_: setattr(counter, "is_in_head", True))
    model.head.register_forward_hook(lambda *_: setattr(counter, "is_in_head", False))


@contextmanager
def saving(model: NatsModel, counter: KernelCounter) -> Iterator[None]:
    """Count the bytes that autograd saves, without the weights."""
    seen = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        counter.saved_bytes += 0 if storage._cdata in seen else storage.nbytes()
        seen.add(storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@contextmanager
def old_head() -> Iterator[None]:
    """Use the plain chunked output layer, which tests compare with, in chunks of 128 MiB of logits."""
    sys.path.append(str(ROOT / "tests" / "helpers"))
    from reference_linear_nats import ReferenceLinearNats

    with (
        patch.object(head_module, "LinearNats", ReferenceLinearNats),
        patch.object(hugging_face, "join_gradients", lambda *_: None),
        patch.dict(hardware.CHUNK_BYTES, cpu=128 * hardware.MIB),
        patch.dict(hardware.CHUNK_ROWS_MULTIPLE, cpu=1),
    ):
        yield


if __name__ == "__main__":
    from kernel_counts_report import write_report

    write_report(ROOT / "docs" / "performance.md")
