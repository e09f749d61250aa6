"""Count the kernels of a micro-batch whose blocks are compiled, by inductor's own scheduler, compiling nothing.

torch built without CUDA has autograd only for fake tensors on the CPU. A block is therefore traced there, and its
forward and backward graphs are moved to a GPU before inductor transforms, lowers and schedules them. That GPU has the
properties of an H100, on which inductor decides how to split sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import fake_cuda
import torch
import torch.nn.functional as F
from kernel_counts import MEMORY_BYTES, SHORTEST_KERNEL, KernelCounter, Totals, build, count
from torch import Tensor, fx
from torch._functorch import config as trace_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx, config, ir, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes import reinplace
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.scheduler import FusedMixOrderReductions, NopKernelSchedulerNode, Scheduler
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megaft.models.attention import attend_without_masks
from megaft.models.blocks import blocks_of
from megaft.models.compiled import OPTIONS
from megaft.weights.families import dimensions_of
from megaft.weights.presets import PRESETS

GPU = torch.device("cuda", 0)
H100 = DeviceProperties(
    type="cuda",
    index=0,
    multi_processor_count=132,
    cc=90,
    major=9,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
)
FUSED = "fused by the compiler"


def count_compiled(model: str, micro_batch_size: int = 8, context_length: int = 1024) -> KernelCounter:
    """Count one micro-batch of a preset in bf16 without dropout, with each block compiled as in training on GPUs."""
    counter = count(model, micro_batch_size, context_length, num_layers=0)
    block, num_layers = count_block(model, micro_batch_size, context_length), dimensions_of(PRESETS[model]).num_layers
    for name, totals in block.categories.items():
        for _ in range(num_layers):
            counter.categories[name] += totals
    counter.products += block.products * num_layers
    counter.saved_bytes += block.saved_bytes * num_layers
    return counter


def count_block(model: str, micro_batch_size: int = 8, context_length: int = 1024) -> KernelCounter:
    """Count the forward and backward pass of one compiled block."""
    counter = KernelCounter()
    with FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.kernels_of_cuda(), _compiler_for_a_gpu():
        nats_model = build(model, is_fused=True, num_layers=1)
        attend_without_masks(nats_model.language_model)
        tokens = torch.zeros(micro_batch_size, context_length, dtype=torch.long)
        [block] = blocks_of(nats_model)
        count_graph: Any = partial(_count_graph, counter)
        block.compile(backend=partial(compile_fx.compile_fx, inner_compile=count_graph), fullgraph=True)
        nats_model(tokens, tokens).backward()
    return counter


@contextmanager
def _compiler_for_a_gpu() -> Iterator[None]:
    """Let inductor schedule for a GPU that is not there."""
    with (
        patch.object(F, "rms_norm", fake_cuda.rms_norm_of_torch),  # the compiler writes its own kernel
        patch.object(DeviceProperties, "create", lambda device: H100),
        patch.object(scheduler, "has_triton", lambda: True),
        patch.object(reinplace, "_inplace_generalized_scatter", lambda result, *_: result),  # else it copies, on CUDA
        config.patch(OPTIONS),
        trace_config.patch(enable_autograd_cache=False),
    ):
        torch._dynamo.reset()
        try:
            yield
        finally:
            torch._dynamo.reset()


def _count_graph(
    counter: KernelCounter,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    is_backward: bool = False,
    static_input_idxs: Sequence[int] = (),
    **_: Any,
) -> Callable[..., Any]:
    """Count a forward or backward graph in place of compiling it, and return a function that allocates its outputs."""
    results: Any = graph.graph.output_node().args[0]
    outputs = [node.meta["val"] if isinstance(node, fx.Node) else None for node in results]
    lowered, nodes = _schedule(graph, inputs, is_backward)
    with V.set_graph_handler(lowered):
        _count_kernels(counter, nodes)
        counter.saved_bytes += 0 if is_backward else _saved_bytes(lowered, static_input_idxs)
    num_counted = _count_products_and_attention(counter, graph)
    assert num_counted == sum(node.is_extern() and not isinstance(node.node, ir.MultiOutput) for node in nodes)
    return make_boxed_func(lambda *_: [None if each is None else torch.empty_like(each) for each in outputs])


def _schedule(graph: fx.GraphModule, inputs: Sequence[Any], is_backward: bool) -> tuple[GraphLowering, list[Any]]:
    """Return a graph lowered for the GPU, and its scheduled kernels."""
    mode = inputs[0].fake_mode
    with V.set_fake_mode(mode), torch.no_grad():
        inputs = _move(graph, partial(_on_gpu, mode), inputs)
        compile_fx._recursive_record_original_output_strides(graph)
        compile_fx._recursive_post_grad_passes(graph)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=is_backward)
        with V.set_graph_handler(lowered), V.set_extern_kernel_nodes([]), V.set_debug_handler(DebugContext()):
            lowered.run(*inputs)
            lowered.init_wrapper_code()
            return lowered, Scheduler(lowered.operations).nodes


def _on_gpu(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)


def _move(graph: fx.GraphModule, to_gpu: Callable[[Tensor], Tensor], inputs: Sequence[Any]) -> list[Tensor]:
    """Move a graph to the GPU, and return its inputs there."""
    for node in graph.graph.nodes:
        node.meta |= {"val": tree_map_only(Tensor, to_gpu, node.meta.get("val"))}
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": GPU}
    return [to_gpu(each) for each in inputs]


def _count_products_and_attention(counter: KernelCounter, graph: fx.GraphModule) -> int:
    """Count the operations that the compiler leaves to libraries, and return their number."""
    number = 0
    for node in graph.graph.nodes:
        name = node.target.__name__.split(".")[0] if node.op == "call_function" else ""
        if name in ("mm", "addmm") or name.startswith("_scaled_dot_product"):
            tensors = [each.meta["val"] for each in node.args if isinstance(each, fx.Node)]
            outputs = [each for each in tree_leaves(node.meta["val"]) if isinstance(each, Tensor)]
            counter.count_operation(name, tensors, outputs)
            number += 1
    return number


def _count_kernels(counter: KernelCounter, nodes: list[Any]) -> None:
    """Count the kernels that the compiler writes.

    Sums over rows that are fused with sums over columns end in one more kernel each, in place of their second stages.
    """
    mixed = [node.node2.get_nodes() for node in nodes if isinstance(node, FusedMixOrderReductions)]
    sums: list[Any] = [each for parts in mixed for each in parts if each.is_reduction()]
    replaced = {
        user.node.get_name() for each in sums if each.node._split_size for user in each.get_outputs()[0].users[:1]
    }
    written = [node for node in nodes if not node.is_extern() and not isinstance(node, NopKernelSchedulerNode)]
    num_kernels = len(sums) + sum(not {each.get_name() for each in node.get_nodes()} <= replaced for node in written)
    moved = [float(node.get_read_write_buffers_sizes()) for node in written]
    seconds = sum(max(each / MEMORY_BYTES, SHORTEST_KERNEL) for each in moved)
    seconds += (num_kernels - len(written)) * SHORTEST_KERNEL
    counter.categories[FUSED] += Totals(num_kernels, sum(moved), 0, 0, seconds)


def _saved_bytes(graph: GraphLowering, weights: Sequence[int]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without weights and its own output."""
    ignored = {graph.graph_input_names[index] for index in weights}
    names = {each.get_name() for each in graph.graph_outputs[1:] if each.maybe_get_name()} - ignored
    inputs: dict[str, Any] = graph.graph_inputs
    kept: list[Any] = [inputs[name] if name in inputs else graph.get_buffer(name) for name in names]
    return sum(int(each.get_numel()) * each.get_dtype().itemsize for each in kept)
