"""Matrix products through oneDNN, which on some processors multiplies twice as fast as the default BLAS."""

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def has_onednn(tensor: Tensor) -> bool:
    """Return whether oneDNN multiplies by this tensor."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@cache
def is_faster() -> bool:
    """Return whether oneDNN multiplies clearly faster than the default BLAS here: tried once, on a product of a step.

    On AMD processors with AVX-512 it is twice as fast, on those with AVX2 alone as fast or slower.
    """
    x, weight = torch.ones(256, 256), torch.ones(1024, 256)
    if not has_onednn(weight):
        return False
    transposed, laid_out = weight.t().contiguous(), packed(weight)
    with torch.no_grad():
        return 1.2 * _shortest(lambda: product(x, laid_out)) < _shortest(lambda: x @ transposed)


def _shortest(run: Callable[[], Tensor]) -> float:
    """Return the shortest of some runs, in seconds."""
    taken = []
    for _ in range(10):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def packed(weight: Tensor, rows: int | None = None) -> Tensor:
    """Return a weight laid out once for many products with about `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias for a weight, packed or not."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_plus(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """Return x Wᵀ + other for a packed weight."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")
