"""Matrix products of the output layer with fp32 results, by the best kernel of each device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor

from megaft.base.half_precision import product_dtype
from megaft.base.hardware import padded_entries


def has_onednn(dtype: torch.dtype, device: torch.device) -> bool:
    """Return True if torch can multiply these matrices with oneDNN; its default, MKL, is slower on AMD."""
    is_available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return is_available and device.type == "cpu" and dtype is torch.float32


def needs_fp32(tensor: Tensor) -> bool:
    """Return True for a half-precision tensor on a CPU without fast instructions for its products."""
    return not is_on_cuda(tensor) and product_dtype(tensor.dtype, tensor.device) is not tensor.dtype


def for_products(weight: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Return the weight in the dtype of its products, to be converted once for several of them."""
    return weight.float() if needs_fp32(weight) else weight


def is_on_cuda(tensor: Tensor) -> bool:
    """Return True if a tensor is on a GPU. tools/benchmarks/fake_cuda.py replaces this for fake tensors on the CPU."""
    return tensor.is_cuda


def aligned(weight: Float[Tensor, "entries width"]) -> Float[Tensor, "rows width"]:
    """Return the weight, on CUDA followed by rows of zeros up to `padded_entries`."""
    missing = padded_entries(len(weight)) - len(weight) if is_on_cuda(weight) else 0
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def fp32_logits(
    hidden: Float[Tensor, "tokens width"], weight: Float[Tensor, "rows width"], bias: Float[Tensor, " entries"] | None
) -> Float32[Tensor, "tokens rows"]:
    """Return hidden @ weight.T + bias. Half-precision products stay in fp32, except on CPUs with fast kernels."""
    if needs_fp32(hidden):
        hidden, weight = hidden.float(), weight.float()
    if has_onednn(hidden.dtype, hidden.device) and not is_on_cuda(hidden):
        logits = torch.ops.mkldnn._linear_pointwise(hidden, weight, None, "none", [], "")
    elif is_on_cuda(hidden) and hidden.dtype is not torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(hidden, weight.T).float()
    if bias is not None:
        logits[:, : len(bias)] += bias
    return logits


def add_product(total: Float32[Tensor, "m n"], left: Float[Tensor, "m k"], right: Float[Tensor, "k n"]) -> None:
    """Add left @ right to `total` in place; where the kernel can, the product is not rounded to half precision."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif is_on_cuda(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right
