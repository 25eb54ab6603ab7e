"""Euclidean projections of weight matrices onto norm balls: what keeps a recurrent layer inside its feasible set."""

import torch
from torch import Tensor

# Row sums and singular values of float32 weights carry rounding errors of about this relative size; projections aim
# that much below the bound, so that the bound holds when the same weights are summed up in float64.
ROUNDING = 4e-6


def weighted_row_sums(weight: Tensor, weights: Tensor) -> Tensor:
    """Σ_k |weight[..., j, k]| weights[k]: the absolute row sums of a matrix, columns weighted.

    >>> weighted_row_sums(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([1.0, 0.5]))
    tensor([2.0000, 1.5000])
    """
    return weight.abs() @ weights


@torch.no_grad()
def project_rows_(weight: Tensor, budget: Tensor, weights: Tensor | None = None, coefficients: Tensor | None = None) -> None:
    """Move each row to the nearest point of its weighted L1 ball, in place: rows inside their ball are not touched.

    `weight` is `(J, K)`, or `(G, J, K)` where unit j owns the G rows `weight[:, j]` together. With p[g, j, k] =
    `coefficients[g, j]` · `weights[k]` (both default to ones), afterwards Σ_gk p[g, j, k] |weight[g, j, k]| ≤ `budget[j]`
    for every j, and the change is the smallest one in the Euclidean norm: soft thresholding by θ_j p, where θ_j is
    found by Newton's method, which on this convex piecewise linear equation is exact after finitely many steps
    (Duchi et al., "Efficient projections onto the l1-ball", ICML 2008).

    >>> w = torch.tensor([[3.0, -1.0], [0.5, 0.5]])
    >>> project_rows_(w, torch.tensor([2.0, 2.0])); w
    tensor([[2.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    grouped = weight if weight.dim() == 3 else weight.unsqueeze(0)
    column = torch.ones(grouped.shape[-1], dtype=weight.dtype, device=weight.device) if weights is None else weights
    sums = weighted_row_sums(grouped, column)
    total = sums.sum(0) if coefficients is None else (coefficients * sums).sum(0)
    over = (total > budget).nonzero().squeeze(-1)
    if over.numel() == 0:
        return
    rows = grouped[:, over]
    price = column.expand_as(rows) if coefficients is None else coefficients[:, over, None] * column
    grouped[:, over] = _soft_threshold(rows, price, budget[over] * (1 - ROUNDING))


def _soft_threshold(rows: Tensor, price: Tensor, budget: Tensor) -> Tensor:
    """The points nearest to `rows` `(G, J, K)` with Σ_gk price |x| = `budget` per j; all of them lie outside."""
    size = rows.abs()
    threshold = torch.zeros_like(budget)
    while True:
        active = size > threshold[:, None] * price
        cost = (active * price * size).sum((0, 2)) - budget
        slope = (active * price * price).sum((0, 2))
        update = torch.where(slope > 0, cost / slope.clamp_min(torch.finfo(slope.dtype).tiny), threshold)
        if not (update > threshold * (1 + 1e-6)).any():
            break
        threshold = torch.maximum(update, threshold)
    # A budget of zero, or rounding, leaves nothing active: the point is then the origin.
    moved = rows.sign() * (size - threshold[:, None] * price).clamp_min(0)
    return torch.where((budget > 0)[:, None], moved, torch.zeros_like(moved))


@torch.no_grad()
def clip_singular_values_(weight: Tensor, bound: float) -> None:
    """Move a matrix to the nearest one (Frobenius norm) of spectral norm at most `bound`, in place and exactly.

    Singular values above `bound` become `bound`, the others and all singular vectors stay. Computed in float64.

    >>> w = torch.diag(torch.tensor([2.0, 0.5]))
    >>> clip_singular_values_(w, 0.9); w.diagonal()
    tensor([0.9000, 0.5000])
    """
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    over = s > bound
    if over.any():
        excess = s[over] - bound * (1 - ROUNDING)
        weight -= ((u[:, over] * excess) @ v[over]).to(weight.dtype)
