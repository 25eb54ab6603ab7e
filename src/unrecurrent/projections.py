"""Euclidean projections of weight matrices onto norm balls: what keeps a recurrent layer inside its feasible set."""

from collections.abc import Callable

import torch
from torch import Tensor

from unrecurrent import kernels
from unrecurrent.errors import Diverged

# Sums over the rows of float32 weights carry relative rounding errors below this; projections aim that much below the
# bound, so that it holds when the same weights are summed up in float64.
ROUNDING = 4e-6
# The relative excess over a budget that may be scaled away when soft thresholding still leaves a little.
SCALE_TOLERANCE = 1e-4
# Newton rounds on one threshold; three or four are usual.
MAX_ROUNDS = 100
# Singular values followed from step to step: one in 20, within these.
FEWEST_DIRECTIONS, MOST_DIRECTIONS = 16, 64
# How far the smallest value followed may lie above the bound before all are clipped exactly, which is far dearer.
OUT_OF_HAND = 0.02
# Orthogonal iterations each time the largest singular values are looked for.
POWER_STEPS = 1
# What is too coarse to add up in: projections of such weights are computed in float32.
HALF = (torch.float16, torch.bfloat16)


def widened(tensor: Tensor) -> Tensor:
    """In float32 if it is in half precision, else itself."""
    return tensor.float() if tensor.dtype in HALF else tensor


def check_finite(*weights: Tensor) -> None:
    """Raise `Diverged` if any of them holds NaN or infinite values, which no projection mends."""
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise Diverged(
            "the weights to keep stable have NaN or infinite values: lower the learning rate, clip the gradients, "
            "or train in float32 (Adam's eps of 1e-8 is zero in float16)"
        )


@torch.no_grad()
def write_back_(weight: Tensor, moved: Tensor) -> None:
    """Write what became of a half-precision `weight` in float32 into it, rounded on in the direction it moved.

    So a bound that the move brought about survives the rounding, however coarse; what did not move stays as it is.

    >>> weight = torch.tensor([1.0, -1.0, 0.5]).bfloat16()
    >>> write_back_(weight, torch.tensor([0.999, -0.999, 0.5]))
    >>> weight.tolist()
    [0.99609375, -0.99609375, 0.5]
    """
    if torch.equal(weight.float(), moved):
        return
    rounded = moved.to(weight.dtype)
    direction = (moved - weight.float()).sign()
    onwards = torch.nextafter(rounded, torch.where(direction > 0, torch.inf, -torch.inf).to(weight.dtype))
    weight.copy_(torch.where(direction * (moved - rounded.float()).sign() > 0, onwards, rounded))


def weighted_row_sums(weight: Tensor, weights: Tensor) -> Tensor:
    """Σ_k |weight[..., j, k]| weights[k]: the absolute row sums of a matrix, columns weighted.

    >>> weighted_row_sums(torch.tensor([[1.0, -2.0], [0.0, 3.0]]), torch.tensor([1.0, 0.5]))
    tensor([2.0000, 1.5000])
    """
    return kernels.row_sums(weight, weights) if kernels.takes(weight) else weight.abs() @ weights


@torch.no_grad()
def project_rows_(weight: Tensor, budget: Tensor) -> None:
    """Move each row `(K,)` of `weight` `(J, K)` to the nearest one whose L1 norm is at most `budget[j]`, in place.

    The change is the smallest in the Euclidean norm, and rows inside their ball are not touched (Duchi et al.,
    "Efficient projections onto the l1-ball for learning in high dimensions", ICML 2008).

    >>> w = torch.tensor([[3.0, -1.0], [0.5, 0.5]])
    >>> project_rows_(w, torch.tensor([2.0, 2.0]))
    >>> w.abs().round(decimals=4)
    tensor([[2.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    ones = torch.ones(weight.shape[1], dtype=weight.dtype, device=weight.device)
    if kernels.takes(weight):
        kernels.hold_l1(weight, ones, budget, ROUNDING, SCALE_TOLERANCE)
        return
    over = (weight.abs().sum(1) > budget * (1 - ROUNDING)).nonzero().squeeze(-1)
    if over.numel():
        weight[over] = shrink_to(weight[over], ones, budget[over])


def shrink_to(rows: Tensor, weights: Tensor, budget: Tensor) -> Tensor:
    """The points nearest to `rows` `(n, K)` with Σ_k |x[j, k]| weights[k] ≤ `budget[j]`."""
    coefficients, allowed = torch.ones_like(budget).unsqueeze(0), budget * (1 - 2 * ROUNDING)
    return shrink_rows(rows.unsqueeze(0), weights, lambda sums: (coefficients, allowed), SCALE_TOLERANCE)[0]


def shrink_rows(
    rows: Tensor, weights: Tensor, cut: Callable[[Tensor], tuple[Tensor, Tensor]], tolerance: float
) -> Tensor:
    """Soft-threshold `rows` `(G, n, K)`, G rows to a unit, until each unit's linear budget for its row sums holds.

    `cut` maps the row sums w `(G, n)`, columns weighted by `weights` `(K,)`, to the budget they have to keep:
    coefficients κ `(G, n)` and a limit `(n,)`, Σ_g κ_g w_g ≤ limit. The nearest point under a fixed budget is
    sign(x) max(|x| − θ κ_g weights_k, 0); Newton's method from below finds θ exactly in finitely many rounds, and since
    thresholds add up, every round may start from the rows the last one left, under the budget that is worst for them.
    A relative excess below `tolerance` is scaled away at the end.
    """
    tiny = torch.finfo(rows.dtype).tiny
    squares = weights * weights
    sums = weighted_row_sums(rows, weights)
    active = squares.sum().expand_as(sums)
    for _ in range(MAX_ROUNDS):
        coefficients, limit = cut(sums)
        excess = (coefficients * sums).sum(0) - limit
        if not (excess > tolerance * limit).any():
            break
        threshold = excess.clamp_min(0) / (coefficients**2 * active).sum(0).clamp_min(tiny)
        reach = (threshold * coefficients).unsqueeze(-1) * weights
        rows = rows - rows.clamp(-reach, reach)
        sums = weighted_row_sums(rows, weights)
        active = (rows != 0).to(rows.dtype) @ squares
    coefficients, limit = cut(sums)
    return rows * (limit / (coefficients * sums).sum(0).clamp_min(tiny)).clamp_max(1)[:, None]


@torch.no_grad()
def clip_singular_values_(weight: Tensor, bound: float, basis: Tensor | None = None) -> float:
    """Move a matrix to the nearest one (Frobenius norm) of spectral norm at most `bound`, in place and exactly.

    Singular values above `bound` become `bound`, less a margin for rounding to the dtype of the weight; the others
    and all singular vectors stay. Computed in float64; returns the spectral norm found. A `basis` `(H, k)`
    becomes the singular vectors of the k largest.

    >>> w = torch.diag(torch.tensor([2.0, 0.5]))
    >>> round(clip_singular_values_(w, 0.9), 3), w.diagonal().round(decimals=3)
    (2.0, tensor([0.9000, 0.5000]))
    """
    check_finite(weight)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    if float(s[0]) > bound:
        half = weight.dtype in HALF
        limit = bound * (1 - max(ROUNDING, torch.finfo(weight.dtype).eps))
        over = s > (limit if half else bound)
        excess = (u[:, over] * (s[over] - limit)) @ v[over]
        weight.copy_(weight.double() - excess) if half else weight.sub_(excess.to(weight.dtype))
    if basis is not None:
        basis.copy_(v[: basis.shape[1]].t())
    return float(s[0])


def first_basis(weight: Tensor) -> Tensor:
    """Orthonormal directions `(H, k)` for `clip_top_` to begin with; the same for all matrices of one shape."""
    generator = torch.Generator().manual_seed(0)
    size = min(max(FEWEST_DIRECTIONS, min(weight.shape) // 20), MOST_DIRECTIONS, *weight.shape)
    columns = torch.randn(weight.shape[1], size, generator=generator)
    return torch.linalg.qr(columns)[0].to(weight).contiguous()


def _orthonormal(columns: Tensor) -> Tensor:
    """Orthonormal columns with the span of the given ones, by Cholesky QR.

    The shift keeps it defined where they are almost dependent; nearly orthonormal is enough here.
    """
    gram = columns.t() @ columns
    gram.diagonal().mul_(1 + 1e-6).add_(torch.finfo(gram.dtype).tiny)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram)[0].mT, columns, upper=True, left=False)


@torch.no_grad()
def clip_top_(weight: Tensor, bound: float, basis: Tensor) -> None:
    """Clip the singular values above `bound` among the few that `basis` `(H, k)` follows from call to call, in place.

    One step of orthogonal iteration on WᵀW, a Rayleigh-Ritz step, and a correction of rank at most k: four passes over
    W instead of a decomposition. Between calls W moves little, so `basis` stays close to its largest singular vectors;
    what it misses is caught by a later call, or by `clip_singular_values_`. Where even the smallest value followed lies
    far above `bound`, more than k of them do: then all are clipped exactly, and followed from there. So are those of a
    matrix that has no more than k.
    """
    all_followed = basis.shape[1] >= min(weight.shape)
    if all_followed or not _clip_followed_(weight, bound, basis):
        clip_singular_values_(weight, bound, basis)


@torch.no_grad()
def _clip_followed_(weight: Tensor, bound: float, basis: Tensor) -> bool:
    """Clip the values followed; where even the smallest is out of hand, only the basis is changed. Returns which."""
    if weight.dtype in (torch.float16, torch.bfloat16):  # torch decomposes no matrices of these
        wide, wide_basis = weight.float(), basis.float()
        enough = _clip_followed_(wide, bound, wide_basis)
        weight.copy_(wide)
        basis.copy_(wide_basis)
        return enough
    moved = basis
    for _ in range(POWER_STEPS):
        moved = _orthonormal(weight.t() @ (weight @ moved))
    image = weight @ moved
    squares, rotation = torch.linalg.eigh(image.t() @ image)
    values = squares.clamp_min(0).sqrt()
    basis.copy_(moved @ rotation)
    if float(values[0]) > bound * (1 + OUT_OF_HAND):
        return False
    if float(values[-1]) > bound:
        excess = (values - bound).clamp_min(0) / values.clamp_min(torch.finfo(values.dtype).tiny)
        weight.addmm_(image @ (rotation * excess), basis.t(), alpha=-1)
    return True
