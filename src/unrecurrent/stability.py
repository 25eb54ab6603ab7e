"""Keep a recurrent layer stable while it is trained: `stabilize`, and drop-in layers that do it by themselves."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrecurrent import kernels
from unrecurrent.cells import check_module, find_recurrent
from unrecurrent.certificate import (
    Certificate,
    certify,
    certify_in_norms,
    check_points,
    checked_bound,
    embedding_table,
    input_points,
)
from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError
from unrecurrent.feasible import (
    TANH_1,
    CappedGate,
    CoupledLSTMGates,
    GRUGates,
    LSTMGates,
    RowBudget,
    blocks_of,
    first_norm,
    fit_norm_,
    highest_ceiling,
    hold_rows_,
)
from unrecurrent.projections import (
    HALF,
    ROUNDING,
    SCALE_TOLERANCE,
    check_finite,
    clip_singular_values_,
    clip_top_,
    first_basis,
    project_rows_,
    weighted_row_sums,
    write_back_,
)
from unrecurrent.self_keeping import ADAPT_EVERY, SelfKeeping, check_norm, checked_rate, target
from unrecurrent.stable_lstm import StableLSTM

__all__ = ["Constraint", "StableGRU", "StableLSTM", "StableRNN", "stabilize"]

METHODS = ("certified", "miller-hardt")
# Miller & Hardt, "Stable recurrent models", ICLR 2019: the forget gate's pre-activation is at most
# 0.128 + 0.75 · 0.25 + 0.25 = 0.5655, hence F = σ(0.5655) < 0.64, 1 − F > 0.36, (1 − F) / 4 > 0.09, (1 − F)² > 0.128.
PAPER_INPUT_BOUND = 0.75
PAPER_FORGET_DRIVE = 0.75 * 0.25
PAPER_FORGET_BIAS = 0.25
PAPER_ROWS = {"i": 0.36, "f": 0.128, "g": 0.09, "o": 0.36}
# The paper asks for a spectral norm below 1; at exactly 1 there is no rate, so stay this far below.
PAPER_SPECTRAL_MARGIN = 0.01
# Iterations for the norm of a layer that was trained without a constraint, and rounds for its drive.
FIRST_FIT = 30
# The smallest ceiling of a gate that is told from a gate that is shut.
SHUT = 1e-30
DRIVE_ROUNDS = 8
# How often all inputs are read to turn gates away from those that drive them furthest, and of how many how often.
READINGS, WORST, TURNS = 2, 32, 64
# What the rows of the gate that keeps the state are taken to sum up to where they have to be cut down anyway, and the
# rounding of its arguments.
LIKELY_ROWS = 1.0
DRIVE_TOLERANCE = 1e-5
# A unit keeps its budget if it exceeds it by no more than this share: what was just projected is not moved again.
KEEPS_TOLERANCE = 0.01
# A drive is a difference of what may be large numbers in float32: it counts as higher by this share of them.
DRIVE_MARGIN = 3e-7
LOWEST_ARGUMENT = -20.0


class _Layer:
    """The tensors of one layer of a torch module, looked up when they are used: views, nothing of its own."""

    def __init__(self, module: nn.Module, suffix: str) -> None:
        self.module, self.suffix = module, suffix

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name + self.suffix)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """W and U and, where there are biases, b_ih and b_hh."""
        own, suffix = self.module._parameters, self.suffix
        names = ("weight_hh", "weight_ih", "bias_ih", "bias_hh") if self.module.bias else ("weight_hh", "weight_ih")
        # A parametrized weight is no parameter of the module itself.
        found = (own.get(name + suffix) for name in names)
        return tuple(getattr(self, name) if t is None else t for name, t in zip(names, found, strict=True))

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        """b_ih and b_hh, or None for a layer without."""
        return (self.bias_ih, self.bias_hh) if self.module.bias else None

    def in_float32(self) -> "_Layer":
        """The same layer with copies of its weights in float32."""
        wide = nn.Module()
        wide.bias = self.module.bias
        names = ("weight_hh", "weight_ih", "bias_ih", "bias_hh")
        for name, weight in zip(names, self.weights, strict=False):
            wide.register_parameter(name + self.suffix, nn.Parameter(weight.detach().float()))
        return _Layer(wide, self.suffix)

    def gate(self, tensor: Tensor, index: int) -> Tensor:
        """The rows of gate `index`, a view."""
        size = self.weight_hh.shape[1]
        return tensor[index * size : (index + 1) * size]


# ---------------------------------------------------------------------------------------------------------------------
# How far the inputs can drive a gate


class _Drive(ABC):
    """The supremum of U x + b_ih + b_hh of one gate over the allowed inputs, unit by unit, and a way to lower it."""

    @abstractmethod
    def refresh(self, weight: Tensor) -> None:
        """Recompute what is too costly to recompute in every step, for the input rows `weight` of the gate."""

    @abstractmethod
    def highest(self, weight: Tensor) -> Tensor:
        """The supremum of `weight` x, without biases `(H,)`."""

    @abstractmethod
    def lower_(self, weight: Tensor, biases: tuple[Tensor, Tensor] | None, room: Tensor) -> None:
        """Change the parameters, in place, so that the supremum with biases is at most `room` `(H,)`."""


def _row_sums(weight: Tensor) -> Tensor:
    return weighted_row_sums(weight, weight.new_ones(weight.shape[1]))


def _total(biases: tuple[Tensor, Tensor] | None) -> Tensor:
    return biases[0] + biases[1] if biases is not None else torch.zeros(())


class _BoxDrive(_Drive):
    """Inputs with ‖x‖_∞ ≤ bound: the supremum bound · Σ|U| + b, lowered by Euclidean projection of U and both b."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def refresh(self, weight: Tensor) -> None:
        """Nothing to do: all of it is recomputed in every step."""

    def highest(self, weight: Tensor) -> Tensor:
        return self.bound * _row_sums(weight)

    def lower_(self, weight: Tensor, biases: tuple[Tensor, Tensor] | None, room: Tensor) -> None:
        if biases is None:
            if bool((room < 0).any()):
                raise InputError("without biases this rate cannot be held: ask for a higher rate or use bias=True")
            if self.bound:
                project_rows_(weight, room / self.bound)
            return
        if kernels.takes(weight) and all(kernels.takes(bias) for bias in biases):
            kernels.lower_drive(weight, biases, self.bound, room, DRIVE_TOLERANCE / 2, DRIVE_ROUNDS)
        else:
            self.lower_reference_(weight, biases, room)

    def lower_reference_(self, weight: Tensor, biases: tuple[Tensor, Tensor], room: Tensor) -> None:
        """`lower_` in PyTorch, on the units that need it."""
        excess = self.highest(weight) + _total(biases) - room
        units = (excess > 0).nonzero().squeeze(-1)
        rows, excess = weight[units], excess[units]
        shift = torch.zeros_like(excess)
        for _ in range(DRIVE_ROUNDS):
            threshold = excess / (self.bound**2 * (rows != 0).sum(1) + 2)
            reach = (threshold * self.bound).unsqueeze(1)
            rows = rows - rows.clamp(-reach, reach)
            shift += threshold
            excess = self.highest(rows) + _total(biases)[units] - 2 * shift - room[units]
            if bool((excess <= DRIVE_TOLERANCE / 2).all()):
                break
            excess = excess.clamp_min(0)
        weight[units] = rows
        for bias in biases:
            bias[units] -= shift + excess.clamp_min(0) / 2


class _TableDrive(_Drive):
    """A finite set of inputs, rows `(N, D)`: the supremum is exact when refreshed.

    It is lowered by turning the rows of U away from the inputs that drive furthest, and then by shifting the biases.
    Shifted alone they would shut the gate for all inputs, so that a few may keep their large drive.
    """

    def __init__(self, table: Callable[[], Tensor]) -> None:
        self.table = table
        self.values: Tensor | None = None

    def refresh(self, weight: Tensor) -> None:
        self.values = self._furthest(weight, 1)[0][:, 0]

    def _furthest(self, weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` inputs that drive each unit furthest, fewer if there are fewer: how far `(H, ·)`, and which."""
        found: list[tuple[Tensor, Tensor]] = []
        begin = 0
        for rows in self.table().split(4096):
            values, places = (weight @ rows.to(weight).t()).topk(min(count, len(rows)))
            found.append((values, begin + places))
            begin += len(rows)
        values, places = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        values, best = values.topk(min(count, values.shape[1]))
        return values, places.gather(1, best)

    def turn_(self, weight: Tensor, biases: tuple[Tensor, Tensor], room: Tensor) -> None:
        """Turn the rows of U away from inputs that drive them further than `room` allows, the worst of each first.

        Each time to the nearest U and b at which that input does so no longer. All inputs are read once for so many of
        the worst that few are left over.
        """
        for _ in range(READINGS):
            values, places = self._furthest(weight, WORST)
            self.values = values[:, 0]
            units = (self.values + _total(biases) > room + DRIVE_TOLERANCE).nonzero().squeeze(-1)
            if not len(units):
                return
            inputs = self.table()[places[units]].to(weight)
            weight[units], shift = _turned(weight[units], inputs, (room - _total(biases))[units])
            for bias in biases:
                bias[units] -= shift
        self.refresh(weight)

    def highest(self, weight: Tensor) -> Tensor:
        if self.values is None:
            self.refresh(weight)
        assert self.values is not None
        return self.values

    def lower_(self, weight: Tensor, biases: tuple[Tensor, Tensor] | None, room: Tensor) -> None:
        if biases is None:
            raise InputError("a layer without biases can be held over input_bound only: give that, or use bias=True")
        excess = (self.highest(weight) + _total(biases) - room).clamp_min(0)
        for bias in biases:
            bias -= excess / 2


def _turned(rows: Tensor, inputs: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(N, D)` that inputs `(N, K, D)` drive no further than `room`, and how much lower each bias is."""
    shift, norms = torch.zeros_like(room), inputs.square().sum(2) + 2
    for _ in range(TURNS):
        excess, worst = ((inputs @ rows.unsqueeze(2)).squeeze(2) - 2 * shift.unsqueeze(1)).max(1)
        excess = (excess - room).clamp_min(0)
        if not bool(excess.any()):
            break
        each = torch.arange(len(rows), device=rows.device)
        step = excess / norms[each, worst]
        rows = rows - step.unsqueeze(1) * inputs[each, worst]
        shift = shift + step
    return rows, shift


# ---------------------------------------------------------------------------------------------------------------------
# How one layer is kept stable


class _Policy(ABC):
    """What is done to one layer: `hold` after each optimizer step, `project` when all is computed afresh."""

    layer: _Layer

    @abstractmethod
    def hold(self) -> None: ...

    @abstractmethod
    def project(self) -> None: ...

    def adapt(self) -> None:  # noqa: B027 - most policies have no norm to adapt
        """Let the norm in which the layer contracts follow its weights."""

    def memory(self) -> Tensor | None:
        """What is remembered from step to step."""
        return None

    def known_drive(self) -> Tensor | None:
        """How far data or a table drive the layer, as last computed; None where that is computed in every step."""
        return None

    def take_drive(self, known: Tensor) -> None:
        """Take up what `known_drive` gave."""
        raise NotImplementedError

    @property
    def remembers(self) -> bool:
        """Whether `hold` depends on more than the weights; where it does not, `project` leaves held weights alone."""
        return self.memory() is not None or self.known_drive() is not None


class _Spectral(_Policy):
    """‖W_hh‖₂ ≤ bound for a layer of an `nn.RNN`: exactly in `project`, nearly in every `hold`."""

    def __init__(self, layer: _Layer, bound: float, basis: Tensor | None = None) -> None:
        self.layer, self.bound = layer, bound
        self.basis = first_basis(layer.weight_hh) if basis is None else basis

    def hold(self) -> None:
        self.basis = self.basis.to(self.layer.weight_hh)
        clip_top_(self.layer.weight_hh, self.bound, self.basis)

    def project(self) -> None:
        self.basis = self.basis.to(self.layer.weight_hh)
        clip_singular_values_(self.layer.weight_hh, self.bound, self.basis)

    def memory(self) -> Tensor:
        return self.basis


def _wide(method: Callable[..., None]) -> Callable[..., None]:
    """Let the method of a policy work in float32 where its layer is in half precision, and write back what it moved."""

    @wraps(method)
    def run(policy: Any, *args: Any) -> None:
        layer = policy.layer
        if layer.weight_hh.dtype not in HALF:
            method(policy, *args)
            return
        check_finite(*layer.weights)
        policy.layer = wide = layer.in_float32()
        try:
            method(policy, *args)
        finally:
            policy.layer = layer
        for weight, moved in zip(layer.weights, wide.weights, strict=True):
            write_back_(weight, moved)

    return run


class _MillerHardtLSTM(_Policy):
    """The paper's four conditions on a layer of an `nn.LSTM`, each a projection of rows onto L1 balls."""

    _rows: kernels.PaperRows | None = None

    def __init__(self, layer: _Layer, input_bound: Callable[[], float], seen: bool = False) -> None:
        self.layer, self.input_bound, self.bound = layer, input_bound, input_bound()
        self.seen = seen  # the bound is that of data or of a table, which may change

    def hold(self) -> None:
        self._keep()

    @torch.no_grad()
    @_wide
    def _keep(self) -> None:
        weights = self.layer.weights
        if not kernels.takes(*weights):
            self._keep_reference()
            return
        if self._rows is None:
            limits = list(PAPER_ROWS.values())
            self._rows = kernels.PaperRows(weights[0].shape[1], weights[1].shape[1], limits, ROUNDING, SCALE_TOLERANCE)
        self._rows(weights, self._drive_limit, 1, PAPER_FORGET_BIAS)

    @property
    def _drive_limit(self) -> float:
        return PAPER_FORGET_DRIVE / max(self.bound, 1e-6)

    def _keep_reference(self) -> None:
        """`_keep` in PyTorch: for other devices and types, and where there is no compiler."""
        layer, size = self.layer, self.layer.weight_hh.shape[1]
        rows = layer.weight_hh.new_tensor(list(PAPER_ROWS.values())).repeat_interleave(size)
        project_rows_(layer.weight_hh, rows)
        drive = torch.full_like(layer.weight_hh[0], self._drive_limit)
        project_rows_(layer.gate(layer.weight_ih, 1), drive)
        if layer.biases is not None:
            bias_ih, bias_hh = layer.biases
            _limit_bias_(layer.gate(bias_ih, 1), layer.gate(bias_hh, 1), PAPER_FORGET_BIAS)

    def project(self) -> None:
        check_finite(*self.layer.weights)
        self.bound = self.input_bound()
        self._keep()

    def known_drive(self) -> Tensor | None:
        return torch.tensor(self.bound, dtype=torch.float64) if self.seen else None

    def take_drive(self, known: Tensor) -> None:
        self.bound = float(known)


def _limit_bias_(bias_ih: Tensor, bias_hh: Tensor, limit: float) -> None:
    """Bring |bias_ih + bias_hh| to at most `limit`: the two add up, so each gives up half of what is too much."""
    total = bias_ih + bias_hh
    excess = total - total.clamp(-limit, limit)
    bias_ih.sub_(excess, alpha=0.5)
    bias_hh.sub_(excess, alpha=0.5)


class _Rows(_Policy):
    """A certified rate for a layer of an `nn.LSTM` or `nn.GRU`, by budgets for its rows and a ceiling on its drive.

    The gate that keeps the state (the LSTM's f, the GRU's z) may be as high as its drive makes it, up to the ceiling at
    which the unit's rows have a quarter of the budget left; the higher it can be, the less the rows may sum up to.
    """

    KEEPING_GATE = 1
    #: the gate whose parameters are the keeping gate's with the other sign; none where negative
    TIED_GATE = -1
    _held: kernels.HeldLayer | None = None

    def __init__(self, layer: _Layer, rate: float, drive: _Drive, norm: Tensor | None = None) -> None:
        self.layer, self.rate, self.drive = layer, target(rate), drive
        self.cap = highest_ceiling(self.rate)
        at_cap = self._budget_at(layer.weight_hh.detach()[:, 0].new_full(layer.weight_hh.shape[1:], self.cap))
        self.norm = first_norm(at_cap, layer.weight_hh) if norm is None else norm

    hidden_bound = 1.0

    @abstractmethod
    def _budget_at(self, ceiling: Tensor) -> RowBudget:
        """The budgets when the gate that keeps the state is at most `ceiling` `(H,)`."""

    def _gate_parameters(self) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        layer, gate = self.layer, self.KEEPING_GATE
        biases = layer.biases
        if biases is not None:
            biases = (layer.gate(biases[0], gate), layer.gate(biases[1], gate))
        return layer.gate(layer.weight_ih, gate), biases

    def _drive_and_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the keeping gate the supremum of the drive, the part that the state can add, and the drive's margin."""
        weight, biases = self._gate_parameters()
        rows = _row_sums(blocks_of(self.layer.weight_hh)[self.KEEPING_GATE]) * self.hidden_bound
        highest = self.drive.highest(weight)
        margin = DRIVE_MARGIN * (highest.abs() + sum(bias.abs() for bias in biases or ()))
        return highest + _total(biases).to(weight) + margin, rows, margin

    def _capped(self, argument: Tensor) -> Tensor:
        """The gate at its highest argument, no higher than the cap and no lower than can be told from zero."""
        return argument.clamp_min(LOWEST_ARGUMENT).sigmoid().clamp_max(self.cap)

    def _budget(self) -> RowBudget:
        """The budgets at what the gate can reach now; in units that do not keep them, with its rows cut down before.

        Without that, the rows of the gate itself, large as they come, would leave such a unit the least of budgets.
        """
        drive, rows, _ = self._drive_and_rows()
        budget = self._budget_at(self._capped(drive + rows))
        if not bool((rows > LIKELY_ROWS).any()):
            return budget
        sums = weighted_row_sums(blocks_of(self.layer.weight_hh), self.norm[-1])
        keeps = budget.gain(sums[list(budget.gates)]) <= self.norm[0] * (1 + KEEPS_TOLERANCE)
        lower = self._capped(drive + rows.clamp_max(LIKELY_ROWS))
        return self._budget_at(torch.where(keeps, budget.ceiling, lower))

    def hold(self) -> None:
        self._keep()

    @torch.no_grad()
    @_wide
    def _keep(self) -> None:
        self.norm = self.norm.to(self.layer.weight_hh)
        weights = self.layer.weights
        if len(weights) == 2 or not kernels.takes(*weights):
            self._keep_reference()
            return
        bound = self.drive.bound if isinstance(self.drive, _BoxDrive) else None
        highest = self.drive.highest(self._gate_parameters()[0]) if bound is None else None
        self._compiled(weights[1].shape[1])(weights, bound, highest, self.norm)

    def _compiled(self, inputs: int) -> kernels.HeldLayer:
        """`_keep_reference` for all units in one call."""
        if self._held is None:
            budget = self._budget_at(self.norm[0])
            drive = {
                "inputs": inputs,
                "keeping": self.KEEPING_GATE,
                "tied": self.TIED_GATE,
                "drive_rounds": DRIVE_ROUNDS,
                "cap": self.cap,
                "hidden_bound": self.hidden_bound,
                "likely_rows": LIKELY_ROWS,
                "keeps_tolerance": KEEPS_TOLERANCE,
                "lowest": LOWEST_ARGUMENT,
                "shut": SHUT,
                "tolerance": DRIVE_TOLERANCE,
                "margin": DRIVE_MARGIN,
            }
            self._held = kernels.HeldLayer(budget, ROUNDING, SCALE_TOLERANCE, drive)
        return self._held

    def _keep_reference(self) -> None:
        """`_keep` in PyTorch and row by row: for other devices and types, and where there is no compiler."""
        budget = self._budget()
        hold_rows_(self.layer.weight_hh, budget, self.norm)
        drive, rows, margin = self._drive_and_rows()
        # A gate that is all but shut has a ceiling of 0 in float32, whose logit would be infinite.
        room = torch.logit(budget.ceiling.clamp_min(SHUT)) - rows
        if bool((drive > room + DRIVE_TOLERANCE).any()):
            self.drive.lower_(*self._gate_parameters(), torch.where(drive > room, room, drive) - margin)

    @torch.no_grad()
    @_wide
    def project(self) -> None:
        check_finite(*self.layer.weights)
        self.norm = self.norm.to(self.layer.weight_hh)
        weight, biases = self._gate_parameters()
        self.drive.refresh(weight)
        if isinstance(self.drive, _TableDrive) and biases is not None:
            self._turn(self.drive, weight, biases)
        self._keep()

    def _turn(self, drive: _TableDrive, weight: Tensor, biases: tuple[Tensor, Tensor]) -> None:
        """Turn the gate away from the inputs that drive it too far; `_keep` takes what is left from the biases."""
        budget = self._budget()
        hold_rows_(self.layer.weight_hh, budget, self.norm)
        _, rows, margin = self._drive_and_rows()
        drive.turn_(weight, biases, torch.logit(budget.ceiling.clamp_min(SHUT)) - rows - margin)

    @torch.no_grad()
    @_wide
    def adapt(self, iterations: int = 1) -> None:
        self.norm = self.norm.to(self.layer.weight_hh)
        fit_norm_(self.layer.weight_hh, self._budget(), self.norm, iterations)

    def memory(self) -> Tensor:
        return self.norm

    def known_drive(self) -> Tensor | None:
        return self.drive.values if isinstance(self.drive, _TableDrive) else None

    def take_drive(self, known: Tensor) -> None:
        assert isinstance(self.drive, _TableDrive)
        self.drive.values = known.to(self.layer.weight_hh.device)


class _GRURows(_Rows):
    def _budget_at(self, ceiling: Tensor) -> CappedGate:
        candidate = _row_sums(blocks_of(self.layer.weight_hh)[2])
        if self.layer.biases is not None:
            candidate = candidate + self.layer.gate(self.layer.biases[1], 2).abs()
        return GRUGates(self.rate, ceiling, candidate)


class _LSTMRows(_Rows):
    def _budget_at(self, ceiling: Tensor) -> CappedGate:
        return LSTMGates(self.rate, ceiling)


class _CoupledRows(_Rows):
    """The same with the input gate tied to the forget gate, i = 1 − f: W_i = −W_f, U_i = −U_f and b_i = −b_f."""

    hidden_bound = TANH_1
    TIED_GATE = 0

    def _budget_at(self, ceiling: Tensor) -> CappedGate:
        return CoupledLSTMGates(self.rate, ceiling)

    @torch.no_grad()
    def _keep(self) -> None:
        if self.layer.weight_hh.dtype in HALF:
            self._merge()  # before: rounding then treats both gates alike
        super()._keep()

    def _keep_reference(self) -> None:
        self._merge()
        super()._keep_reference()
        self._copy()

    @torch.no_grad()
    def project(self) -> None:
        self._merge()
        super().project()

    def _turn(self, drive: _TableDrive, weight: Tensor, biases: tuple[Tensor, Tensor]) -> None:
        super()._turn(drive, weight, biases)
        self._copy()

    def _gates(self) -> list[tuple[Tensor, Tensor]]:
        """Rows of the input and of the forget gate, in all weights and biases."""
        layer = self.layer
        tensors = (layer.weight_ih, layer.weight_hh, *(layer.biases or ()))
        return [(layer.gate(tensor, 0), layer.gate(tensor, 1)) for tensor in tensors]

    def _merge(self) -> None:
        """Half the difference of the two gates' rows goes to f, its negative to i: the nearest tied rows."""
        for i, f in self._gates():
            f.sub_(i).div_(2)
        self._copy()

    def _copy(self) -> None:
        for i, f in self._gates():
            torch.neg(f, out=i)


# ---------------------------------------------------------------------------------------------------------------------
# stabilize


class Constraint:
    """What `stabilize` returns: it keeps a module stable, says what is proved about it, and can be taken off again."""

    def __init__(
        self,
        policies: list[_Policy],
        certify_now: Callable[[], Certificate],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._policies, self._certify, self._steps = policies, certify_now, 0
        before = [weight.detach().clone() for weight in self._weights()]
        for policy in policies:
            if isinstance(policy, _Rows):
                policy.adapt(FIRST_FIT)
        self.project()
        # Until weights move again: what was loaded before this constraint was made can be had back.
        self._before: list[Tensor] | None = before
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.hold()

    def hold(self) -> None:
        """What happens after each optimizer step: keep the recurrent rows in bounds, at the drive ranges last known."""
        self._before = None
        self._steps += 1
        for policy in self._policies:
            if self._steps % ADAPT_EVERY == 0:
                policy.adapt()
            policy.hold()

    def project(self) -> None:
        """Move the weights to nearby ones at which the constraint holds, drive ranges and norms computed afresh."""
        self._before = None
        for policy in self._policies:
            policy.project()

    def certificate(self) -> Certificate:
        """What is proved about the module as it stands now, over the inputs `stabilize` was told about."""
        return self._certify()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered from step to step, for a training run that is to resume bit for bit."""
        return {
            "steps": self._steps,
            "memory": [_copy(policy.memory()) for policy in self._policies],
            "drives": [_copy(policy.known_drive()) for policy in self._policies],
            "weights": _digest(self._weights()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; the module's weights are loaded before it.

        It does not matter whether `stabilize` was called before or after they were: what that moved is put back.

        Raises:
            InputError: a state of another constraint, or weights that are not those it was saved with.
        """
        kept = state["memory"]
        # States saved before these were kept go on with the ranges and the weights as they are now.
        drives = state.get("drives", [policy.known_drive() for policy in self._policies])
        self._check_state(kept, drives)
        if "weights" in state:
            self._find_weights(state["weights"])
        self._steps = int(state["steps"])
        for policy, memory, drive in zip(self._policies, kept, drives, strict=True):
            own = policy.memory()
            if own is not None:
                own.copy_(memory)
            if drive is not None:
                policy.take_drive(drive)

    def _check_state(self, kept: Sequence[Tensor | None], drives: Sequence[Tensor | None]) -> None:
        own = [policy.memory() for policy in self._policies], [policy.known_drive() for policy in self._policies]
        if any(_shapes(mine) != _shapes(theirs) for mine, theirs in zip(own, (kept, drives), strict=True)):
            raise InputError(
                "this state is that of another constraint: call stabilize on a module like the one it was saved with, "
                "and with the same method and kind of inputs"
            )
        for policy, memory in zip(self._policies, kept, strict=True):
            if isinstance(policy, _Rows) and memory is not None:
                check_norm(memory, "memory")

    def _weights(self) -> list[Tensor]:
        """The weights that are held at what is remembered."""
        return [weight for policy in self._policies if policy.remembers for weight in policy.layer.weights]

    @torch.no_grad()
    def _find_weights(self, digest: str) -> None:
        """See to it that the weights are those of this digest: as they are, or as they were before `stabilize`."""
        if _digest(self._weights()) == digest:
            return
        if self._before is None or _digest(self._before) != digest:
            raise InputError(
                "the weights are not those this state was saved with: load the module's weights saved at the same time "
                "first, then this state, and train after that"
            )
        for weight, before in zip(self._weights(), self._before, strict=True):
            weight.copy_(before)

    def remove(self) -> None:
        """Stop projecting after optimizer steps; the weights stay as they are."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _digest(weights: Sequence[Tensor]) -> str:
    return tensor_digest((str(number), weight.double()) for number, weight in enumerate(weights))


def _shapes(tensors: Sequence[Tensor | None]) -> list[torch.Size | None]:
    return [None if tensor is None else tensor.shape for tensor in tensors]


def _norms(policies: Sequence[_Policy]) -> list[Tensor | None]:
    """The norms in which layers are held, where they are held in one."""
    return [policy.norm if isinstance(policy, _Rows) else None for policy in policies]


def stabilize(
    module: nn.Module,
    *,
    rate: float = 0.98,
    method: str = "certified",
    inputs: Tensor | PackedSequence | None = None,
    input_bound: float | None = None,
    embedding: nn.Embedding | Tensor | None = None,
    coupled: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Constraint:
    """Make a recurrent module stable, in place, and keep it so after every step of `optimizer`.

    Its weights are moved to nearby ones for which `certify` proves a rate of at most `rate`; they stay ordinary
    parameters of an ordinary module. For an `nn.RNN` that is ‖W_hh‖₂ ≤ rate, the singular values above it clipped. For
    an `nn.LSTM` and an `nn.GRU` each unit's rows of W_hh keep a budget, and the drive U x + b of the gate that keeps
    the state a ceiling (docs/stability.md). The rows are held after each step; the range of the drive over `inputs` or
    `embedding` is recomputed by `.project()` and `.certificate()`, over `input_bound` in each step.

    Args:
        module: an `nn.RNN`, `nn.LSTM` or `nn.GRU` with any number of layers, or one of their cells; with `input_bound`,
            or where no inputs need be stated, any module that holds some.
        rate: the contraction factor a step to hold, between 0 and 1.
        method: "certified", or "miller-hardt" for the conditions of Miller and Hardt (ICLR 2019), for RNN and LSTM:
            ‖W_hh‖₂ ≤ 0.99; or row sums of W_i, W_o ≤ 0.36, W_f ≤ 0.128, W_z ≤ 0.09, B_x U_f ≤ 0.1875 and
            |b_f| ≤ 0.25, with B_x the bound on the inputs (default: the paper's 0.75). `rate` does not apply to it.
        inputs: data `(..., D)` as the layer reads it; the statement then covers inputs that drive it no further.
        input_bound: covers all inputs with ‖x_t‖_∞ ≤ input_bound as they reach the layer, after any dropout.
        embedding: covers all sequences of the rows of an `nn.Embedding`, or of a table (V, D).
        coupled: tie the input gate of an `nn.LSTM` to its forget gate, i = 1 − f, and keep it so. It allows far more.
        optimizer: the one that trains the module. Without it, call `.hold()` or `.project()` after each step.

    Raises:
        InputError: a rate outside (0, 1), an unknown method, no statement about the inputs where the cell needs one,
            inputs or an embedding of another width or with NaN, bidirectional or projected layers, NaN weights, layers
            that keep themselves stable, or an optimizer that does not train the module.

    >>> lstm = nn.LSTM(3, 5)
    >>> optimizer = torch.optim.Adam(lstm.parameters())
    >>> constraint = stabilize(lstm, rate=0.9, input_bound=1.0, coupled=True, optimizer=optimizer)
    >>> constraint.certificate().rate <= 0.9
    True
    """
    rate = checked_rate(rate)
    _check(module, method, (inputs, input_bound, embedding), coupled, optimizer)
    found = [layer for _, layer in find_recurrent(module) if not isinstance(layer, SelfKeeping)]
    if not found:
        raise InputError(f"{type(module).__name__} keeps itself stable: give its rate when you make it")
    if module not in found and (inputs is not None or embedding is not None):
        raise InputError("inputs and embedding belong to one recurrent layer: give that layer instead of the model")

    points = None if inputs is None else input_points(inputs, _width(module))
    if embedding is not None:
        check_points(embedding_table(embedding), _width(module), "the embedding")
    table = _table(embedding if points is None else points)

    def bound() -> float:
        if table is not None:
            return float(table().abs().max())
        return PAPER_INPUT_BOUND if input_bound is None else float(input_bound)

    built: dict[nn.Module, list[_Policy]] = {}
    for recurrent in found:
        drive = _input_drive(table, input_bound)
        if method == METHODS[1]:
            built[recurrent] = _miller_hardt(recurrent, bound, seen=table is not None)
        else:
            built[recurrent] = _certified(recurrent, rate, drive, coupled)
    policies = [policy for own in built.values() for policy in own]

    def certify_now() -> Certificate:
        stated: dict[str, Any] = {"inputs": points, "embedding": embedding, "input_bound": input_bound}
        if method != METHODS[1]:
            return certify_in_norms(module, {layer: _norms(own) for layer, own in built.items()}, **stated)
        if table is None:
            stated["input_bound"] = bound()
        return certify(module, **stated, method=method)

    return Constraint(policies, certify_now, optimizer)


def _check(
    module: nn.Module,
    method: str,
    stated: tuple[Any, ...],
    coupled: bool,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    check_module(module)
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if sum(given is not None for given in stated) > 1:
        raise InputError("give only one of inputs, input_bound and embedding: each says which inputs are allowed")
    bound = stated[1]
    if bound is not None:
        checked_bound(bound)
    if coupled and (method == METHODS[1] or not any(isinstance(m, nn.LSTM | nn.LSTMCell) for m in module.modules())):
        raise InputError("coupled=True ties the gates of an nn.LSTM, with method='certified': leave it out here")
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise InputError(f"optimizer must be one of torch.optim, already made, got {type(optimizer).__name__}")
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in trained for p in module.parameters()):
            raise InputError("the optimizer trains no parameter of the module: give the one that does")


def _width(layer: nn.Module) -> int:
    return int(layer.input_size)  # type: ignore[arg-type]


def _table(given: nn.Embedding | Tensor | None) -> Callable[[], Tensor] | None:
    """The rows `(N, D)` that inputs are taken from, as they are when asked for; None if there are none."""
    if given is None:
        return None

    def rows() -> Tensor:
        found = embedding_table(given).detach()
        check_finite(found)
        return found.reshape(-1, found.shape[-1])

    return rows


def _input_drive(table: Callable[[], Tensor] | None, input_bound: float | None) -> Callable[[], _Drive] | None:
    """How inputs can drive the first layer, one object a gate; None if nothing was said about them."""
    if table is not None:
        return lambda: _TableDrive(table)
    if input_bound is not None:
        return lambda: _BoxDrive(float(input_bound))
    return None


def _layers(module: nn.Module) -> list[_Layer]:
    """The layers of a torch recurrent module, lowest first; one of its cells is its only layer."""
    weights = [name for name in module._parameters if name.startswith("weight_hh")]
    if not weights:
        raise InputError("the weights of this layer are computed from others (a parametrization): remove that first")
    count = getattr(module, "num_layers", None)
    return [_Layer(module, "")] if count is None else [_Layer(module, f"_l{k}") for k in range(count)]


def _bound_between(module: nn.Module, hidden_bound: float) -> float:
    """Bound on what a layer above the first reads: dropout scales |h| ≤ hidden_bound by 1 / (1 − p) in training."""
    dropout = float(getattr(module, "dropout", 0.0))
    return hidden_bound / (1 - dropout) if dropout < 1 else hidden_bound


def _miller_hardt(module: nn.Module, bound: Callable[[], float], seen: bool) -> list[_Policy]:
    if isinstance(module, nn.RNN | nn.RNNCell):
        return [_Spectral(layer, 1 - PAPER_SPECTRAL_MARGIN) for layer in _layers(module)]
    if not isinstance(module, nn.LSTM | nn.LSTMCell):
        raise InputError(
            f"the conditions of Miller and Hardt are about RNN and LSTM, not {type(module).__name__}: use 'certified'"
        )
    between = _bound_between(module, 1.0)
    first, *above = _layers(module)
    return [_MillerHardtLSTM(first, bound, seen), *(_MillerHardtLSTM(layer, lambda: between) for layer in above)]


def _certified(module: nn.Module, rate: float, drive: Callable[[], _Drive] | None, coupled: bool) -> list[_Policy]:
    if isinstance(module, nn.RNN | nn.RNNCell):
        return [_Spectral(layer, target(rate)) for layer in _layers(module)]
    if drive is None:
        raise InputError(
            f"the gates of {type(module).__name__} come arbitrarily close to 1 unless its inputs are bounded: "
            "give input_bound, inputs or embedding"
        )
    is_gru = isinstance(module, nn.GRU | nn.GRUCell)
    rows = _GRURows if is_gru else _CoupledRows if coupled else _LSTMRows
    between = _bound_between(module, rows.hidden_bound)
    return [
        rows(layer, rate, _BoxDrive(between) if number else drive()) for number, layer in enumerate(_layers(module))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Layers that keep themselves stable


class _SelfKeepingLayer(SelfKeeping):
    """What `StableRNN` and `StableGRU` share: a policy a layer, its memory in a buffer."""

    bidirectional: bool

    def __init__(self, *args: Any, rate: float, **kwargs: Any) -> None:
        rate = checked_rate(rate)
        super().__init__(*args, **kwargs)
        if self.bidirectional:
            raise InputError(f"{type(self).__name__} runs forward in time only: leave out bidirectional")
        self.rate = rate
        self._kept_exactly = True
        for k, policy in enumerate(self._policies()):
            if isinstance(policy, _Rows):
                policy.adapt(FIRST_FIT)
            self.register_buffer(f"kept_l{k}", policy.memory())
        self.project()

    def _policies(self) -> list[_Policy]:
        raise NotImplementedError

    def _memory(self, k: int) -> Tensor | None:
        """What layer k remembers from step to step; None before it is first made."""
        return getattr(self, f"kept_l{k}", None)

    def _project(self) -> None:
        for policy in self._policies():
            policy.project()
        self._kept_exactly = True

    def _hold(self) -> None:
        for policy in self._policies():
            policy.hold()
        self._kept_exactly = False

    def _adapt(self) -> None:
        for k, policy in enumerate(self._policies()):
            policy.adapt()
            memory, adapted = self._memory(k), policy.memory()
            if memory is not None and adapted is not None and adapted is not memory:  # its dtype is not the weights'
                memory.copy_(adapted)

    def _check_loaded(self, name: str, loaded: Tensor) -> None:
        if not bool(loaded.isfinite().all()):
            raise InputError(f"{name} has NaN or infinite values: these weights are damaged")

    def settle(self) -> None:
        if not self._kept_exactly:
            self.project()
        super().settle()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.keep_before_use()
        return super().forward(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rate={self.rate}"


class StableRNN(_SelfKeepingLayer, nn.RNN):
    """An `nn.RNN` that contracts at `rate` in the Euclidean norm whatever it reads: ‖W_hh‖₂ ≤ rate in every layer.

    h ← tanh(U x + W h + b), or ReLU. In `eval()` and `state_dict()` all singular values of W are clipped, exactly;
    after an optimizer step the largest ones, so that while it trains the norm may lie some percent above. Arguments,
    shapes and errors are those of `nn.RNN`, and `rate` between 0 and 1. Source: docs/stability.md.

    >>> rnn = StableRNN(3, 5, rate=0.9)
    >>> y, h = rnn(torch.randn(7, 4, 3))
    >>> certify(rnn).rate <= 0.9
    True
    """

    def __init__(self, *args: Any, rate: float = 0.98, **kwargs: Any) -> None:
        super().__init__(*args, rate=rate, **kwargs)

    def _policies(self) -> list[_Policy]:
        return [_Spectral(layer, target(self.rate), self._memory(k)) for k, layer in enumerate(_layers(self))]


class StableGRU(_SelfKeepingLayer, nn.GRU):
    """An `nn.GRU` that contracts at `rate` on all inputs with ‖x_t‖_∞ ≤ input_bound.

    h ← (1 − z) n + z h. Budgets for the rows of W_hh and a ceiling on the drive of z are held in every step. Arguments,
    shapes and errors are those of `nn.GRU`, `rate` between 0 and 1, and `input_bound`, a bound on the inputs as they
    reach the layer: nothing is proved about larger ones. Source: docs/stability.md.

    >>> gru = StableGRU(3, 5, rate=0.9, input_bound=1.0)
    >>> y, h = gru(torch.rand(7, 4, 3))
    >>> certify(gru, input_bound=1.0).rate <= 0.9
    True
    """

    input_bound: float

    def __init__(self, *args: Any, rate: float = 0.98, input_bound: float = 1.0, **kwargs: Any) -> None:
        # Set before nn.Module is, because its set-up ends with the first projection, which needs the bound.
        object.__setattr__(self, "input_bound", checked_bound(input_bound))
        super().__init__(*args, rate=rate, **kwargs)

    @property
    def known_norms(self) -> list[Tensor | None]:
        """The norms in which the layers contract, where `certify` begins its search."""
        return [self._memory(k) for k in range(self.num_layers)]

    def _check_loaded(self, name: str, loaded: Tensor) -> None:
        if name.startswith("kept"):
            check_norm(loaded, name)

    def _policies(self) -> list[_Policy]:
        between = _bound_between(self, 1.0)
        drives = [_BoxDrive(between if k else self.input_bound) for k in range(self.num_layers)]
        return [
            _GRURows(layer, self.rate, drive, self._memory(k))
            for k, (layer, drive) in enumerate(zip(_layers(self), drives, strict=True))
        ]
