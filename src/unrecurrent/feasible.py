"""Which recurrent weights contract at a wanted rate: budgets, unit by unit, for the row sums of the gates.

A cell contracts at rate λ in the max norm weighted by v = (v_c, v_h) if its error propagator T (docs/certificates.md)
satisfies T(v) ≤ λ v. With w_g = |W_g| v_h, the row sums of gate g weighted by v, this says for each unit that

* the largest value of Σ_g κ_g w_g / (λ − f), over all values its gates and its candidate can take, is at most v_c, and
* in an LSTM, the largest value of o (1 − t²) λ v_c + o (1 − o) |t| w_o, over the output gate o and t = tanh(c), is at
  most λ v_h.

At fixed gate values both are linear in |W|: the feasible set is convex, and the nearest point under one such budget is
a soft thresholding. docs/stability.md derives the coefficients κ.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from unrecurrent import kernels
from unrecurrent.cells import TANH_PIECES
from unrecurrent.projections import (
    HALF,
    ROUNDING,
    SCALE_TOLERANCE,
    check_finite,
    shrink_rows,
    shrink_to,
    weighted_row_sums,
    widened,
    write_back_,
)

TANH_1 = math.tanh(1.0)
# A gate that keeps the state leaves at least this share of the rate to its unit's rows, whatever its drive asks for.
LEAST_SHARE = 0.25
# No unit weighs more than this much more or less than the geometric mean of all.
NORM_SPREAD = 16.0


@dataclass(frozen=True, eq=False)
class TanhPieces:
    """A tanh with values in [−end, end] in pieces: on each its largest slope `(P, 1)` and largest |value| `(P, 1)`."""

    slope: Tensor
    magnitude: Tensor


@cache
def tanh_pieces(end: float, dtype: torch.dtype, device: torch.device, anywhere: bool) -> TanhPieces:
    """Pieces of a tanh: where it is steep its value is small, so that the two are bounded together.

    The pieces are those of `certify`, where the range is the whole symmetric one. A range that a bounded drive makes
    smaller is cut up elsewhere; `anywhere=True` covers all such cuts.
    """
    width = 2 * end / TANH_PIECES
    count = TANH_PIECES if anywhere else TANH_PIECES // 2
    low = torch.arange(count, dtype=dtype, device=device).unsqueeze(1) * (end / count)
    reach = low + width + (end / count if anywhere else 0.0)
    return TanhPieces(1 - low * low, reach.clamp_max(end))


def _worst(coefficients: Tensor, sums: Tensor, slack: Tensor) -> tuple[Tensor, Tensor]:
    """Of the cuts `(G, P, n)` the one that asks for the largest v_c, as `(G, n)` and its λ − f `(n,)`."""
    worst = ((coefficients * sums.unsqueeze(1)).sum(0) / slack).argmax(0, keepdim=True)
    chosen = coefficients.gather(1, worst.expand(len(coefficients), -1, -1)).squeeze(1)
    return chosen, slack.expand_as(coefficients[0]).gather(0, worst).squeeze(0)


class RowBudget(ABC):
    """How the row sums of one kind of cell enter its contraction rate.

    `gates` are the blocks of `weight_hh` that share a unit's budget, `output` is the block of the output gate or None,
    `cell_bound` bounds |c| (infinity: not at all), and `rate` is the λ to hold. `kind` names the formula of `cut` in
    row_budgets.c, whose gate is f = `gate_scale` σ(a) ≤ `ceiling`.
    """

    kind: str
    ceiling: Tensor
    gate_scale: Tensor
    candidate_bound: Tensor

    gates: tuple[int, ...]
    output: int | None = None
    cell_bound: float = 1.0
    anywhere = True

    def __init__(self, rate: float, like: Tensor) -> None:
        self.rate = rate
        self.ceiling = like
        self.gate_scale = self.candidate_bound = torch.ones_like(like)
        self.candidate = tanh_pieces(1.0, like.dtype, like.device, self.anywhere)
        self.squashed = tanh_pieces(math.tanh(self.cell_bound), like.dtype, like.device, self.anywhere)

    @abstractmethod
    def cut(self, sums: Tensor, units: Tensor | slice) -> tuple[Tensor, Tensor]:
        """For row sums `(gates, n)` the coefficients κ `(gates, n)` at the worst gate values, and λ − f `(n,)`."""

    def gain(self, sums: Tensor, units: Tensor | slice = slice(None)) -> Tensor:
        """The smallest v_c `(n,)` with which these row sums contract at the rate."""
        coefficients, slack = self.cut(sums, units)
        return (coefficients * sums).sum(0) / slack

    def output_gain(self, sums: Tensor, v_cell: Tensor) -> Tensor:
        """The smallest v_h `(n,)` with which these row sums of the output gate contract at the rate."""
        steep, large = self.squashed.slope * v_cell, self.squashed.magnitude * sums / self.rate
        inside = (steep + large) ** 2 / (4 * large).clamp_min(torch.finfo(large.dtype).tiny)
        return torch.where(large > steep, inside, steep).amax(0)

    def output_budget(self, norm: Tensor) -> Tensor:
        """The largest row sums `(n,)` of the output gate under the norm: the inverse of `output_gain`."""
        steep, v_state = self.squashed.slope * norm[0], norm[-1]
        root = (v_state * (v_state - steep)).clamp_min(0).sqrt()
        return self.rate * ((2 * v_state - steep + 2 * root) / self.squashed.magnitude).amin(0)


class ScaledGate(RowBudget):
    """The cell of `StableLSTM`: rows (f, z, o), forget gate f = F̄ σ(a) with a ceiling F̄ < λ per unit, input gate 1 − f.

    On the piece of the candidate with slope s and |c − z| ≤ d, κ = ((1 − f) s for z, f (1 − f/F̄) d for f). The worst f
    is the smaller root of f² − 2 λ f + F̄ (λ + (1 − λ) s w_z / (d w_f)) = 0, or F̄ where there is none below.
    """

    kind, gates, output, anywhere = "mixture", (1, 0), 2, False

    def __init__(self, rate: float, ceiling: Tensor) -> None:
        super().__init__(rate, ceiling)
        self.gate_scale = ceiling

    def cut(self, sums: Tensor, units: Tensor | slice) -> tuple[Tensor, Tensor]:
        ceiling, rate, tiny = self.ceiling[units], self.rate, torch.finfo(sums.dtype).tiny
        slope, distance = self.candidate.slope, 1 + self.candidate.magnitude
        ratio = slope * sums[0] / (distance * sums[1]).clamp_min(tiny)
        discriminant = rate * (rate - ceiling) - ceiling * (1 - rate) * ratio
        f = torch.where(discriminant > 0, rate - discriminant.clamp_min(0).sqrt(), ceiling).minimum(ceiling)
        return _worst(torch.stack(((1 - f) * slope, f * (1 - f / ceiling) * distance)), sums, rate - f)


class CappedGate(RowBudget):
    """A cell whose forget or update gate has no ceiling of its own: `ceiling` `(H,)` is what its drive allows.

    For such gates the worst value is always the highest one.
    """


def highest_ceiling(rate: float) -> float:
    """The highest gate that leaves a unit's rows `LEAST_SHARE` of the rate: (λ − f) / (1 − f) = share · λ."""
    return (1 - LEAST_SHARE) * rate / (1 - LEAST_SHARE * rate)


class CoupledLSTMGates(CappedGate):
    """An `nn.LSTM` (rows i, f, g, o) with i = 1 − f: κ = ((1 − f) s for g, f (1 − f) d for f)."""

    kind, gates, output = "mixture", (2, 1), 3

    def cut(self, sums: Tensor, units: Tensor | slice) -> tuple[Tensor, Tensor]:
        f = self.ceiling[units]
        slope, distance = self.candidate.slope, 1 + self.candidate.magnitude
        return _worst(torch.stack(((1 - f) * slope, f * (1 - f) * distance)), sums, self.rate - f)


class LSTMGates(CappedGate):
    """An `nn.LSTM` (rows i, f, g, o) as it is, |c| ≤ 1 / (1 − f̄): κ = (i s for g, i (1 − i) |z| for i, f̄ for f)."""

    kind, gates, output, cell_bound = "lstm", (2, 0, 1), 3, math.inf

    def cut(self, sums: Tensor, units: Tensor | slice) -> tuple[Tensor, Tensor]:
        f = self.ceiling[units]
        slope, magnitude = self.candidate.slope, self.candidate.magnitude
        i = worst_gate(slope * sums[0], magnitude * sums[1])
        return _worst(torch.stack((i * slope, i * (1 - i) * magnitude, f.expand_as(i))), sums, self.rate - f)


class GRUGates(CappedGate):
    """An `nn.GRU` (rows r, z, n) with β ≥ |W_n h + b_hn|.

    κ = ((1 − z) r s for n, (1 − z) r (1 − r) β s for r, z (1 − z) d for z).
    """

    kind, gates = "gru", (2, 0, 1)

    def __init__(self, rate: float, ceiling: Tensor, candidate_bound: Tensor) -> None:
        super().__init__(rate, ceiling)
        self.candidate_bound = candidate_bound

    def cut(self, sums: Tensor, units: Tensor | slice) -> tuple[Tensor, Tensor]:
        z, bound = self.ceiling[units], self.candidate_bound[units]
        slope, distance = self.candidate.slope, 1 + self.candidate.magnitude
        r = worst_gate(sums[0], bound * sums[1])
        candidate = (1 - z) * slope
        coefficients = torch.stack((candidate * r, candidate * (r * (1 - r) * bound), z * (1 - z) * distance))
        return _worst(coefficients, sums, self.rate - z)


def worst_gate(direct: Tensor, through: Tensor) -> Tensor:
    """The g in [0, 1] where g · direct + g (1 − g) · through is largest; both are at least 0."""
    return ((direct + through) / (2 * through).clamp_min(torch.finfo(direct.dtype).tiny)).clamp_max(1)


def blocks_of(weight: Tensor) -> Tensor:
    """`weight_hh` `(G H, H)` as `(G, H, H)`, a view."""
    return weight.view(-1, weight.shape[1], weight.shape[1])


def first_norm(budget: RowBudget, weight: Tensor) -> Tensor:
    """The weights v `(parts, H)` to begin with, those of c before those of h: all units alike."""
    return weight.new_ones(1 if budget.output is None else 2, weight.shape[1])


def needed_norm(weight: Tensor, budget: RowBudget, norm: Tensor) -> Tensor:
    """Γ(v): the smallest v `(parts, H)` each unit may have when the errors of all units are v; homogeneous of degree 1.

    The layer contracts at the rate, in the norm weighted by v, exactly if Γ(v) ≤ v.
    """
    sums = weighted_row_sums(blocks_of(weight), norm[-1])
    needed = budget.gain(sums[list(budget.gates)])
    if budget.output is None:
        return needed.unsqueeze(0)
    return torch.stack((needed, budget.output_gain(sums[budget.output], norm[0])))


@torch.no_grad()
def fit_norm_(weight: Tensor, budget: RowBudget, norm: Tensor, iterations: int = 1) -> None:
    """Move v, in place, towards the one in which all units need the same share of their budgets.

    Iterating v ← √(v Γ(v)) tends to the eigenvector of Γ, where the largest of Γ(v) / v is smallest: no other norm
    allows more at these weights. v is kept within a factor `NORM_SPREAD` of its geometric mean, which is 1.
    """
    wide = widened(weight)
    for _ in range(iterations):
        before = widened(norm)
        moved = (before * needed_norm(wide, budget, before).maximum(1e-3 * before)).sqrt()
        moved[-1] = moved[-1].maximum(moved[0])
        moved /= moved.log().mean().exp()
        check_finite(moved)
        norm.copy_(moved.clamp(1 / NORM_SPREAD, NORM_SPREAD))


@torch.no_grad()
def hold_rows_(weight: Tensor, budget: RowBudget, norm: Tensor) -> None:
    """Move `weight_hh`, in place, to a nearby matrix whose rows keep their budgets; rows that do are not touched.

    Each unit's rows are soft-thresholded along the cut that is worst for them, until it holds (`shrink_rows`).
    Half-precision rows are held in float32 and rounded towards zero; the budget is one in float32 for them.
    """
    if weight.dtype in HALF:
        check_finite(weight)
        wide = weight.float()
        hold_rows_(wide, budget, norm.float())
        write_back_(weight, wide)
        return
    if not kernels.takes(weight):
        hold_rows_reference_(weight, budget, norm)
        return
    limit = norm[0] if budget.output is None else budget.output_budget(norm)
    kernels.hold_rows(
        weight,
        kind=budget.kind,
        gates=budget.gates,
        output=budget.output,
        rate=budget.rate,
        rounding=ROUNDING,
        tolerance=SCALE_TOLERANCE,
        norm=norm,
        units=(budget.ceiling, budget.gate_scale, budget.candidate_bound, limit),
        pieces=(budget.candidate.slope, budget.candidate.magnitude),
    )


@torch.no_grad()
def hold_rows_reference_(weight: Tensor, budget: RowBudget, norm: Tensor) -> None:
    """`hold_rows_` in PyTorch: for other devices and types, and where there is no compiler."""
    blocks, joint = blocks_of(weight), list(budget.gates)
    sums = weighted_row_sums(blocks, norm[-1])
    over = (budget.gain(sums[joint]) > norm[0] * (1 - ROUNDING)).nonzero().squeeze(-1)
    if over.numel():
        gates, allowed = torch.tensor(joint, device=weight.device)[:, None], norm[0][over] * (1 - 2 * ROUNDING)

        def cut(row_sums: Tensor) -> tuple[Tensor, Tensor]:
            coefficients, slack = budget.cut(row_sums, over)
            return coefficients, slack * allowed

        blocks[gates, over] = shrink_rows(blocks[gates, over], norm[-1], cut, SCALE_TOLERANCE)
    if budget.output is not None:
        limit = budget.output_budget(norm)
        over = (sums[budget.output] > limit * (1 - ROUNDING)).nonzero().squeeze(-1)
        if over.numel():
            blocks[budget.output, over] = shrink_to(blocks[budget.output, over], norm[-1], limit[over])
