"""certify(): what can be proved about how fast a recurrent layer forgets.

Everything here follows from the error propagator T of a cell (`cells.py`, derivations in `docs/certificates.md`):

* rate λ: T(v) ≤ λ v for some v > 0 (Collatz and Wielandt), so that the v-weighted max norm of the difference of two
  states shrinks by λ in every step;
* horizon k(ε): T^j applied to the largest error there can be stays at or below ε for every j ≥ k.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unrecurrent.cells import (
    AnyInput,
    BoxInput,
    Cell,
    DenseCell,
    InputSet,
    Interval,
    LSTMCell,
    NormPropagator,
    PointInput,
    Propagator,
    RNNCell,
    Stack,
    StackedCell,
    StateLayout,
    balanced_weights,
    build_cells,
    cell_tensors,
    euclidean_rnn,
    find_recurrent,
    is_recurrent,
    spectral_norm,
)
from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError, as_number

METHODS = ("best", "componentwise", "spectral", "miller-hardt")
# A rate counts as below 1 when it is by more than this: more than float64 rounding of the sums behind it.
STABLE_MARGIN = 1e-12
# Rate: iterate at most this often, and stop when upper and lower bound agree to this relative tolerance.
RATE_STEPS = 1000
RATE_TOLERANCE = 1e-7
# Of the first so many steps every other is extrapolated from so many iterates.
EXTRAPOLATED_STEPS = 200
EXTRAPOLATION_WINDOW = 8
# Where those steps leave the bounds further apart than this share of 1 − rate, as they do for units that forget
# slowly, a state of up to this size is worth solving linear equations for, this many times, or until they agree to the
# smaller share, of the rate too.
POLISH_GAP, POLISH_MET = 1e-3, 1e-4
POLISH_SIZE = 512
POLISH_STEPS = 24
# States up to this size get this many steps instead, which still take no time.
POLISH_SMALL = 64
POLISH_SPREAD = 1e-30
# No weight is smaller than this, so that the products behind T(v) stay far from the smallest numbers of float64.
LEAST_WEIGHT = 1e-250
# Where the weights of a stack's layers are too far apart for float64, these powers of them are tried.
STACK_POWERS = (0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 0)
TINY = 1e-300
# Horizon: iterate at most this often, this many steps at a time, then extrapolate with the rate.
HORIZON_STEPS = 10_000
HORIZON_BLOCK = 64


# ---------------------------------------------------------------------------------------------------------------------
# Rate


@torch.inference_mode(False)
def contraction_rate(propagator: Propagator) -> tuple[float, Tensor]:
    """The smallest rate found and the weights v (state_size,) that prove it: T(v) ≤ rate · v.

    λ ≤ max_j T(v)_j / v_j holds for every v > 0, so every iterate is sound and the best is kept. The update is damped,
    v ← ½ v + ½ T(v) / max T(v): without the damping a cycle of two would never improve. The smallest ratio is a bound
    from below, so the search ends where the two meet. At first every other step is extrapolated (Anderson's method):
    where that works it is ten times faster, and where it does not it is left behind. Small states whose bounds have not
    met by then are polished (`_polished`). A rate of infinity means that nothing was found.

    Source: Collatz, *Einschließungssatz für die charakteristischen Zahlen von Matrizen*, 1942; for homogeneous maps see
    Lemmens and Nussbaum, *Nonlinear Perron-Frobenius Theory*, 2012.

    >>> cell = RNNCell(torch.zeros(2, 1), torch.tensor([[0.0, 0.9], [0.4, 0.0]]))
    >>> round(contraction_rate(cell)[0], 4)
    0.6
    """
    if isinstance(propagator, Stack):
        return _stacked_rate(propagator, [contraction_rate(layer) for layer in propagator.layers])
    known = propagator.known_weights
    if known is not None and not bool((known.isfinite() & (known >= LEAST_WEIGHT)).all()):
        known = None  # no norm: nothing to begin with
    v = torch.ones(propagator.state_size, dtype=torch.float64) if known is None else known
    best, best_v, floor = math.inf, v, 0.0
    path: list[tuple[Tensor, Tensor]] = []
    for step in range(RATE_STEPS):
        moved = propagator.propagate(v)
        largest = float(moved.max())
        if largest == 0:
            return 0.0, v
        if not math.isfinite(largest):
            break
        ratios = moved / v
        floor = max(floor, float(ratios.min()))
        if float(ratios.max()) < best:
            best, best_v = float(ratios.max()), v
        if best - floor <= RATE_TOLERANCE * best:
            break
        damped = _normalised(v / v.max() + moved / largest)
        path = [*path[1 - EXTRAPOLATION_WINDOW :], (v.log(), damped.log())]
        extrapolate = step % 2 == 1 and step < EXTRAPOLATED_STEPS
        v = _extrapolated(path) if extrapolate else damped
        if step == EXTRAPOLATED_STEPS:
            if best - floor > POLISH_GAP * abs(1 - best) and propagator.state_size <= POLISH_SIZE:
                best, best_v, floor = _polished(propagator, best, best_v, floor)
            v = best_v
            if _met(best, floor):
                break
    if best - floor > POLISH_GAP * abs(1 - best) and propagator.state_size <= POLISH_SIZE:
        best, best_v, _ = _polished(propagator, best, best_v, floor)
    return best, best_v


def _polished(propagator: Propagator, best: float, v: Tensor, floor: float) -> tuple[float, Tensor, float]:
    """Improve a rate, its weights v and the bound from below by Noda's iteration.

    v ← (λ − J)⁻¹ v with J the Jacobian of T at v.

    T is the maximum of linear maps, J the one that is largest at v, and λ the bound that v proves, so that the inverse
    is non-negative and v stays positive; convergence is quadratic. Every v proves its own bound, as ever.

    Source: Noda, *Note on the computation of the maximal eigenvalue of a non-negative irreducible matrix*, 1971.
    """
    best_v, identity, upper = v, torch.eye(len(v), dtype=v.dtype), best
    for _ in range(POLISH_STEPS if len(v) > POLISH_SMALL else POLISH_SMALL):
        v, singular = torch.linalg.solve_ex(upper * (1 + 1e-12) * identity - propagator.jacobian(v), v)
        if singular or not bool((v > 0).all() and v.isfinite().all()):
            break
        # A reducible T asks for weights ever further apart; too far apart they would do for no layer above this one.
        v = (v / v.max()).clamp_min(POLISH_SPREAD)
        ratios = propagator.propagate(v) / v
        upper, floor = float(ratios.max()), max(floor, float(ratios.min()))
        # Where another of the linear maps becomes the largest, the bound may rise before it falls.
        if upper < best:
            best, best_v = upper, v
        if _met(best, floor):
            break
    return best, best_v, floor


def _met(best: float, floor: float) -> bool:
    return best - floor <= max(RATE_TOLERANCE * best, POLISH_MET * min(best, abs(1 - best)))


def _normalised(v: Tensor) -> Tensor:
    return (v / v.max()).clamp_min(LEAST_WEIGHT)


def _extrapolated(path: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Where the iteration is heading: Anderson's extrapolation of log v from the last iterates and their successors."""
    before, after = (torch.stack(logs, 1) for logs in zip(*path, strict=True))
    residual = after - before
    share = torch.linalg.lstsq(residual.diff(dim=1), residual[:, -1:]).solution
    heading = (after[:, -1:] - after.diff(dim=1) @ share).squeeze(1)
    return _normalised((heading - heading.max()).exp()) if bool(heading.isfinite().all()) else after[:, -1].exp()


def _stacked_rate(stack: Stack, parts: Sequence[tuple[float, Tensor]]) -> tuple[float, Tensor]:
    """Rate of a stack from those of its layers: T is block-triangular, so it is as good as its worst layer.

    The weights of a layer may be so far apart that those of the stack would overflow. Then they are moved together: the
    smallest raised, or all taken to powers v^p. Either costs each layer some of its rate; the best one tried is kept.
    """
    worst = max(rate for rate, _ in parts)
    best, best_v = math.inf, torch.ones(stack.state_size, dtype=torch.float64)
    if not math.isfinite(worst):
        return best, best_v
    negligible = _negligible(worst)
    for power, spread in ((1, 0.0), (1, POLISH_SPREAD), *((power, 0.0) for power in STACK_POWERS)):
        nearer = [(v / v.max()).clamp_min(spread) ** power for _, v in parts]
        rates = [_ratio_bound(layer, v) for layer, v in zip(stack.layers, nearer, strict=True)]
        v = _scaled_up(stack, rates, nearer, LEAST_WEIGHT if power < 1 else 1.0)
        rate = _ratio_bound(stack, v)
        if rate < best:
            best, best_v = rate, v
        if best <= worst + 2 * negligible:
            break
    return best, best_v


def _negligible(rate: float) -> float:
    return 1e-6 * (abs(1 - rate) + 1e-6)


def _ratio_bound(propagator: Propagator, v: Tensor) -> float:
    """The rate that the weights v prove; infinite where they or their image leave the range of float64."""
    ratios = propagator.propagate(v) / v
    return float(ratios.max()) if bool((ratios.isfinite() & (v >= LEAST_WEIGHT)).all()) else math.inf


def _scaled_up(stack: Stack, rates: Sequence[float], weights: Sequence[Tensor], least: float) -> Tensor:
    """Weights of the stack: those of each layer, scaled up until what the layer below sends, T_l(0, e), is negligible
    beside them; T_l(v, e) ≤ T_l(v, 0) + T_l(0, e) because T is a maximum of linear maps. The lowest layer's are scaled
    down to `least` where they are above it, which leaves room for the others.
    """
    worst = max(rates)
    scaled: list[Tensor] = []
    below = None
    for layer, rate, v in zip(stack.layers, rates, weights, strict=True):
        if below is None:
            v = v * min(1.0, least / float(v.min()))
        else:
            sent = layer.propagate(torch.zeros_like(v), below)
            v = v * max(1.0, float((sent / v).max()) / (worst - rate + _negligible(worst)))
        scaled.append(v)
        below = layer.hidden(layer.propagate(v, below))
    return torch.cat(scaled)


# ---------------------------------------------------------------------------------------------------------------------
# Horizon


@dataclass(frozen=True, eq=False)
class Readout:
    """What a horizon is about: the hidden state itself, `weight @ h`, or the log-softmax of that."""

    weight: Tensor | None = None
    log_softmax: bool = False

    def change(self, propagator: Stack, errors: Tensor) -> Tensor:
        """Largest change of any output for each error vector in `errors` (n, state_size), as (n,)."""
        if self.weight is None:
            return propagator.components(errors).amax(-1)
        hidden = propagator.hidden(errors)
        change = self._largest(propagator, self.weight, hidden)
        if not self.log_softmax:
            return change
        # A softmax does not see what all rows of W have in common, so that may be taken away first.
        common = (self.weight.amax(0) + self.weight.amin(0)) / 2
        return 2 * torch.minimum(change, self._largest(propagator, self.weight - common, hidden))

    @staticmethod
    def _largest(propagator: Stack, weight: Tensor, hidden: Tensor) -> Tensor:
        return (hidden @ propagator.readout(weight).T).amax(-1)

    @property
    def subject(self) -> str:
        if self.weight is None:
            return "the last hidden state"
        return "the log-probabilities" if self.log_softmax else "the outputs"


@dataclass(frozen=True, eq=False)
class Proof:
    """A propagator with a rate, and the weights v that prove it."""

    method: str
    propagator: Stack
    rate: float
    weights: Tensor
    _horizons: dict[tuple[float, Readout], int | None] = field(default_factory=dict, repr=False)
    _blocks: dict[Readout, list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, method: str, propagator: Stack) -> "Proof":
        return cls(method, propagator, *contraction_rate(propagator))

    @classmethod
    def of_stack(cls, layers: Sequence["Proof"], stack: Stack) -> "Proof":
        return cls(layers[0].method, stack, *_stacked_rate(stack, [(p.rate, p.weights) for p in layers]))

    @property
    def contracts(self) -> bool:
        return self.rate < 1 - STABLE_MARGIN

    def pack(self, errors: Tensor, sizes: Sequence[int]) -> Tensor:
        """Errors of the components of a state (..., state_size), layers of these sizes, as the propagator keeps them.

        That is as they are, or one norm a layer.
        """
        norms = self._norms()
        parts = zip(norms, errors.split(list(sizes), -1), strict=True) if norms else ()
        return torch.stack([norm.of(part) for norm, part in parts], -1) if norms else errors

    def components(self, errors: Tensor) -> Tensor:
        """What such errors allow each component of the state (..., state_size)."""
        norms = self._norms()
        parts = [norm.components(errors[..., n : n + 1]) for n, norm in enumerate(norms)]
        return torch.cat(parts, -1) if norms else errors

    def _norms(self) -> list[NormPropagator]:
        return [layer for layer in self.propagator.layers if isinstance(layer, NormPropagator)]

    def horizon(self, eps: float, readout: Readout) -> int | None:
        """Smallest k such that T^j(e_0) changes the readout by at most `eps` for *every* j ≥ k; None without proof.

        T^j need not fall monotonically. It is settled once T(e) ≤ e in all components, because then it falls for ever
        after, or once the v-weighted norm of e is too small for the readout to exceed `eps`. What was computed is kept:
        asked again, or for another `eps`, the steps are not taken again.
        """
        if (eps, readout) not in self._horizons:
            self._horizons[eps, readout] = self._horizon(eps, readout)
        return self._horizons[eps, readout]

    def _horizon(self, eps: float, readout: Readout) -> int | None:
        if not (self.contracts and bool(self.propagator.invariant().isfinite().all())):
            return None
        smallest = 0
        for start, (changes, before, e) in zip(
            range(0, HORIZON_STEPS, HORIZON_BLOCK), self._orbit(readout), strict=False
        ):
            exceeding = (changes > eps).nonzero()
            if len(exceeding):
                smallest = start + int(exceeding[-1]) + 1
            if smallest < start + HORIZON_BLOCK and self._settled(before, e, eps, readout):
                return smallest
            least, most = self._remaining(e, eps, readout)
            if least == most < math.inf:
                return start + HORIZON_BLOCK + int(most)
        return start + HORIZON_BLOCK + int(most) if most < math.inf else None

    def _orbit(self, readout: Readout) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """T^j(e_0), a block of steps at a time: the change of the readout in each step, and the last two errors."""
        kept = self._blocks.setdefault(readout, [])
        yield from tuple(kept)
        e = kept[-1][-1] if kept else self.propagator.invariant()
        while True:
            errors = []
            for _ in range(HORIZON_BLOCK):
                errors.append(e)
                e = self.propagator.propagate(e)
            kept.append((readout.change(self.propagator, torch.stack(errors)), errors[-1], e))
            yield kept[-1]

    def _settled(self, before: Tensor, e: Tensor, eps: float, readout: Readout) -> bool:
        if bool((e <= before).all()):
            return True
        ceiling = (e / self.weights).max() * self.weights
        return float(readout.change(self.propagator, ceiling.unsqueeze(0))) <= eps

    def _remaining(self, e: Tensor, eps: float, readout: Readout) -> tuple[float, float]:
        """Bounds on the number of steps until an error `e` is settled, from T^m(u) ≤ θ^m u wherever T(u) ≤ θ u.

        u is either v, scaled to lie above e, or e itself; that also gives the bound from below, with the least ratio.
        """
        change = float(readout.change(self.propagator, e.unsqueeze(0)))
        ratios = (self.propagator.propagate(e) / e)[e > 0]
        if len(ratios) == 0:
            return 0, 0
        ceiling = (e / self.weights).max() * self.weights
        most = min(
            _steps_until(eps, float(readout.change(self.propagator, ceiling.unsqueeze(0))), self.rate),
            _steps_until(eps, change, float(ratios.max())) if float(ratios.max()) < 1 else math.inf,
        )
        return _steps_until(eps, change, float(ratios.min())), most


def _steps_until(eps: float, change: float, factor: float) -> float:
    """Smallest m with factor^m · change ≤ eps; infinite where the change does not shrink."""
    if change <= eps:
        return 0
    if factor >= 1 or change == math.inf:
        return math.inf
    return 1 if factor == 0 else math.ceil(math.log(eps / change) / math.log(factor))


# ---------------------------------------------------------------------------------------------------------------------
# The conditions of Miller and Hardt


def miller_hardt(cell: Cell) -> NormPropagator:
    """The rate that goes with the conditions of Miller and Hardt, *Stable Recurrent Models* (ICLR 2019).

    RNN: ‖W‖₂. LSTM: F + (‖W_i‖_∞ + ‖W_o‖_∞)/4 + ‖W_z‖_∞ + ‖W_f‖_∞/(4 (1 − F)), a contraction factor of
    max(‖Δc‖_∞, ‖Δh‖_∞), with F as in `_unmet_conditions`.
    """
    ones = torch.ones(cell.state_size, dtype=torch.float64)
    if isinstance(cell, RNNCell):
        gain, input_gain = spectral_norm(cell.weight_hh), spectral_norm(cell.weight_ih)
        return NormPropagator(gain, input_gain, euclidean_rnn(cell).reach, order=2, weights=ones)
    lstm = _as_lstm(cell)
    spare = _spare(lstm)
    gain, input_gain = 1 - spare + _sum_test(lstm.weight_hh, spare), _sum_test(lstm.weight_ih, spare)
    return NormPropagator(gain, input_gain, float(lstm.invariant().max()), order=math.inf, weights=ones)


def _as_lstm(cell: Cell) -> LSTMCell:
    if isinstance(cell, LSTMCell):
        return cell
    kind = type(cell).__name__
    raise InputError(f"the conditions of Miller and Hardt are about RNN and LSTM, not {kind}: use method='best'")


def _sum_test(weight: Tensor, spare: float) -> float:
    i, f, z, o = _row_sums(weight)
    return (i + o) / 4 + z + (f / (4 * spare) if spare else math.inf)


def _row_sums(weight: Tensor) -> list[float]:
    """‖·‖_∞ of each gate's weights, i, f, z, o: the largest absolute sum over a row."""
    return [float(rows.abs().sum(1).max()) for rows in weight.chunk(4)]


def _spare(cell: LSTMCell) -> float:
    """1 − F with F = σ(‖W_f‖_∞ + B_x ‖U_f‖_∞ + ‖b_f‖_∞), b_f the sum of both biases and B_x the bound on the inputs."""
    w_f, u_f = _row_sums(cell.weight_hh)[1], _row_sums(cell.weight_ih)[1]
    argument = w_f + float(cell.drive_bias().chunk(4)[1].abs().max())
    if u_f:
        argument += cell.input_bound * u_f
    return float(torch.sigmoid(torch.tensor(-argument, dtype=torch.float64)))


def _unmet_conditions(cell: Cell) -> tuple[str, ...]:
    """Sentences on the conditions of Miller and Hardt that do not hold.

    RNN: ‖W‖₂ < 1. LSTM: ‖W_i‖_∞, ‖W_o‖_∞ < 1 − F, ‖W_z‖_∞ < (1 − F)/4, ‖W_f‖_∞ < (1 − F)².
    """
    if isinstance(cell, RNNCell):
        conditions = {"‖W‖₂": (spectral_norm(cell.weight_hh), 1.0)}
    else:
        lstm = _as_lstm(cell)
        spare = _spare(lstm)
        i, f, z, o = _row_sums(lstm.weight_hh)
        limits = {"i": (i, spare), "f": (f, spare**2), "z": (z, spare / 4), "o": (o, spare)}
        conditions = {f"‖W_{gate}‖_∞": pair for gate, pair in limits.items()}
    return tuple(
        f"{name} is {value:.4g} but must be below {limit:.4g}"
        for name, (value, limit) in conditions.items()
        if not value < limit
    )


# ---------------------------------------------------------------------------------------------------------------------
# The certificate


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """What is proved about how fast a recurrent layer forgets; made by `certify`.

    It holds for the weights as they were, in real arithmetic, under `assumptions`.

    >>> rnn = nn.RNN(3, 4)
    >>> _ = nn.init.eye_(rnn.weight_hh_l0)
    >>> certificate = certify(rnn)
    >>> certificate.stable, round(certificate.rate, 6), certificate.horizon(0.01), len(certificate.reasons)
    (False, 1.0, None, 1)
    """

    stable: bool
    """Whether a contraction is proved."""
    rate: float | None
    """Best bound found on the contraction factor a step: below 1 if stable, else how far it misses; None: no bound."""
    method: str
    """What proved it: componentwise, spectral or miller-hardt."""
    assumptions: tuple[str, ...]
    """Sentences that say under which conditions it holds."""
    reasons: tuple[str, ...] = ()
    """Sentences that say why nothing is proved; empty for a stable layer."""
    layers: tuple["Certificate", ...] = ()
    """One certificate a layer of a stack, or a recurrent module of a model that holds several."""
    name: str = ""
    proofs: tuple[Proof, ...] = ()
    readout: Readout = field(default_factory=Readout)
    cell: StackedCell | None = None
    layout: StateLayout | None = None
    input_bound: float = math.inf
    fingerprint: str = ""
    """A digest of the weights it is about; empty for a `Cell`."""

    def horizon(self, eps: float) -> int | None:
        """Number of past inputs after which older ones change the last hidden state by at most `eps`, or None.

        Compares every reachable state with the zero state, as a truncation does; for two arbitrary pasts ask for
        eps / 2. With a readout the change is that of its outputs. It is the smallest k such that the bound stays at or
        below `eps` from the k-th step on. None where nothing is proved, where the state has no bound (a ReLU layer with
        unbounded inputs) or none that float64 can follow, and for a model of several recurrent modules.
        """
        eps = checked_eps(eps)
        if not self.stable:
            return None
        horizons = [proof.horizon(eps, self.readout) for proof in self.proofs]
        return min((k for k in horizons if k is not None), default=None)

    def is_about(self, module: nn.Module) -> bool:
        """Whether the module's weights are the ones this was proved for (a `Cell` is taken at its word)."""
        return not self.fingerprint or self.fingerprint == _fingerprint(module)

    def propagate(self, e: Tensor, steps: int = 1) -> Tensor:
        """Bound on the difference of two states `steps` steps after it was at most `e` (..., state_size).

        Both states must lie within the invariant bounds and read the same inputs.
        """
        e, sizes, bounds = self._errors(e), self._cell().sizes, []
        for proof in self.proofs:
            packed = proof.pack(e, sizes)
            for _ in range(steps):
                packed = proof.propagator.propagate(packed)
            bounds.append(proof.components(packed))
        return torch.stack(bounds).amin(0)

    def hidden(self, e: Tensor) -> Tensor:
        """The part of an error vector (..., state_size) that bounds the last layer's output h (..., H)."""
        return self._cell().hidden(self._errors(e))

    @property
    def invariant(self) -> Tensor:
        """Bounds on |state|, component by component (state_size,): layer 0 first, of each layer c before h."""
        return self._cell().invariant()

    def flatten(self, hx: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The module's own state, h or (h, c), as one vector a sequence (B, state_size); see `StateLayout.flatten`."""
        if self.layout is None:
            raise InputError("only the certificate of one recurrent module has a state: use those in .layers")
        return self.layout.flatten(hx)

    def holds_for(self, x: Tensor, h0: Tensor | tuple[Tensor, Tensor] | None = None, batch_first: bool = False) -> bool:
        """Whether the assumptions hold for this input x (T, B, D) or (B, T, D) and this start state (None: zero).

        What is checked of the input is the range of every unit's drive U x + b, which is all that the proof uses;
        `batch_first` makes no difference to it.
        """
        cell = self._cell()
        first = cell.cells[0]
        if not isinstance(first, DenseCell):
            raise InputError("a cell of your own states its inputs itself: holds_for knows only torch's modules")
        if not isinstance(x, Tensor):
            raise InputError(f"x must be a tensor (steps, batch, features), got {type(x).__name__}")
        _check_width(x, first.weight_ih.shape[1], "x")
        within = first.allows(x) and bool((x.detach().abs() <= self.input_bound).all())
        if h0 is None or not within:
            return within
        box = cell.invariant_box()
        return box.is_finite() and box.contains(self.flatten(h0))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and text, ready for JSON; horizons at 10⁻² and 10⁻³."""
        return {
            "name": self.name,
            "stable": self.stable,
            "rate": self.rate,
            "method": self.method,
            "horizon": {str(eps): self.horizon(eps) for eps in (1e-2, 1e-3)},
            "assumptions": list(self.assumptions),
            "reasons": list(self.reasons),
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def __repr__(self) -> str:
        label = f" of {self.name}" if self.name else ""
        if self.stable:
            lines = [f"Certificate{label}: stable, rate {self.rate:.6g} ({self.method})"]
            shown = () if self.cell is None else (1e-2, 1e-3)  # several modules have no common horizon
            lines += [f"  horizon({eps:g}) = {self.horizon(eps)} on {self.readout.subject}" for eps in shown]
        else:
            lines = [f"Certificate{label}: not proved stable ({self.method})", *(f"  {r}" for r in self.reasons)]
        lines += [f"  holds for {sentence}" for sentence in self.assumptions]
        lines += [f"  {layer.name or f'layer {n}'}: {_summary(layer)}" for n, layer in enumerate(self.layers)]
        return "\n".join(lines)

    def _errors(self, e: Tensor) -> Tensor:
        size = self._cell().state_size
        if not isinstance(e, Tensor) or e.dim() == 0 or e.shape[-1] != size:
            got = tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__
            raise InputError(f"e must be a tensor (..., {size}), a bound for each component of the state, got {got}")
        return e.double()

    def _cell(self) -> StackedCell:
        if self.cell is None:
            raise InputError("only the certificate of one recurrent module has a state: use those in .layers")
        return self.cell


def checked_eps(eps: Any) -> float:
    """A change a horizon can be about, or `InputError`."""
    number = as_number(eps)
    if number is None or number <= 0:
        raise InputError(f"eps must be a positive number, got {eps!r}")
    return number


def _summary(certificate: Certificate) -> str:
    rate = "no bound on the rate" if certificate.rate is None else f"rate {certificate.rate:.6g}"
    return f"{'stable' if certificate.stable else 'not proved stable'}, {rate} ({certificate.method})"


# ---------------------------------------------------------------------------------------------------------------------
# certify


def certify(
    module: nn.Module | Cell,
    *,
    inputs: Tensor | PackedSequence | tuple[Tensor, ...] | None = None,
    input_bound: float | None = None,
    embedding: nn.Embedding | Tensor | None = None,
    h0: Tensor | tuple[Tensor, Tensor] | None = None,
    readout: nn.Module | None = None,
    method: str = "best",
) -> Certificate:
    """Prove how fast a recurrent layer forgets: a rate, a horizon, and the assumptions they hold under.

    The difference e of two states obeys e' ≤ T(e) with the error propagator T of the cell (docs/certificates.md); the
    rate is the smallest λ found with T(v) ≤ λ v for some v > 0, and the horizon follows from iterating T.

    Args:
        module: an `nn.RNN/LSTM/GRU` (any number of layers) or one of their cells, a `StableLSTM`, any module that holds
            them, or a `Cell`. Several recurrent modules are certified one by one, each with what it is taken to read,
            since how they are wired is not known: in `.layers`, and without a common horizon.
        inputs: what the statement is about. Data for the layer, (T, B, D) or (B, T, D), or any number of rows (N, D):
            it then holds for inputs whose drive U x + b stays in the range seen, unit by unit. For a model that holds
            the layer: an argument (or a tuple of them) to run the model on, to see what reaches the layer.
        input_bound: holds for all inputs of the layer with ‖x_t‖_∞ ≤ input_bound; bound what arrives after dropout,
            which scales by 1/(1 − p) in training.
        embedding: an `nn.Embedding` or a table (V, D): holds for all sequences of its rows. With none of these three
            the statement covers all inputs.
        h0: start states in the module's own layout; the zero state is always covered. They widen the invariant bounds
            where they lie outside.
        readout: an `nn.Linear` on the last layer's h, or `nn.Sequential(linear, nn.LogSoftmax(-1))`: horizons are then
            about its outputs. Of several recurrent modules it is taken to read the last.
        method: "componentwise" (T itself), "spectral" (RNN: ‖diag(L) W‖₂), "best" (the better of the two), or
            "miller-hardt" (RNN and LSTM: the sufficient conditions of Miller and Hardt, ICLR 2019).

    Raises:
        InputError: bidirectional or projected layers, layers whose weights do not say what they compute (methods of
            their own, weights that a hook makes anew), weights or inputs that are not finite, no recurrent layer, more
            than one of inputs, input_bound and embedding, shapes that do not fit, or a method the layer does not have.

    >>> rnn = nn.RNN(3, 4)
    >>> with torch.no_grad():
    ...     _ = rnn.weight_hh_l0.copy_(torch.eye(4) / 2)
    >>> certificate = certify(rnn)
    >>> certificate.stable, round(certificate.rate, 6), certificate.horizon(0.01)
    (True, 0.5, 7)
    """
    stated: dict[str, Any] = {"inputs": inputs, "input_bound": input_bound, "embedding": embedding, "h0": h0}
    return certify_in_norms(module, {}, **stated, readout=readout, method=method)


#: for a recurrent layer that is kept in bounds by something else, the norms `(parts, H)` of its layers
Norms = Mapping[nn.Module, Sequence[Tensor | None]]


def certify_in_norms(
    module: nn.Module | Cell,
    norms: Norms,
    *,
    inputs: Any = None,
    input_bound: float | None = None,
    embedding: nn.Embedding | Tensor | None = None,
    h0: Any = None,
    readout: nn.Module | None = None,
    method: str = "best",
) -> Certificate:
    """`certify`, where norms are known in which layers contract: the search for a rate begins there, which is sound
    because every v > 0 proves its own rate. Layers that keep themselves stable bring theirs (`known_norms`).
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    if sum(given is not None for given in (inputs, input_bound, embedding)) > 1:
        raise InputError("give only one of inputs, input_bound and embedding: each says which inputs are allowed")
    answer = _readout(readout)
    if isinstance(module, Cell):
        if any(given is not None for given in (inputs, input_bound, embedding, h0)):
            raise InputError("a Cell states its own inputs and start states: call certify(cell) without them")
        return _certify_cell(module, method, answer, ("the inputs and start states its bounds were made for",))
    found = find_recurrent(module)
    if h0 is not None and len(found) > 1:
        raise InputError(f"h0 belongs to one layer, but the module holds {len(found)}: certify them one by one")
    if is_recurrent(module) and module._forward_pre_hooks and (inputs is not None or embedding is not None):
        raise InputError(
            f"{type(module).__name__} has hooks that may change what it reads: give the model that holds it, with"
            " inputs=, or what the layer reads behind them as input_bound="
        )
    if inputs is not None and not is_recurrent(module):
        allowed = _capture(module, found, inputs)
    else:
        allowed = [_allowed(layer, inputs, input_bound, embedding) for _, layer in found]
    readouts = [*(Readout() for _ in found[1:]), answer]  # what reads a model reads its last layer
    certificates = [
        _certify_layer(layer, name, method, readout, what, h0, norms.get(layer, getattr(layer, "known_norms", ())))
        for (name, layer), what, readout in zip(found, allowed, readouts, strict=True)
    ]
    return certificates[0] if len(certificates) == 1 else _joint(certificates)


def _certify_layer(
    layer: nn.Module,
    name: str,
    method: str,
    readout: Readout,
    allowed: "_Allowed",
    h0: Any,
    norms: Sequence[Tensor | None],
) -> Certificate:
    layout = StateLayout.of(layer)
    start = None if h0 is None else _range(layout.flatten(h0))
    if start is None and isinstance(allowed.start, Tensor):
        start = _range(allowed.start)
    if method == "miller-hardt" and start is not None and float(start.magnitude.max()) > 1:
        raise InputError("the conditions of Miller and Hardt are about states within [-1, 1]: give such an h0")
    cell = build_cells(layer, allowed.inputs, start, see_ties=method != "miller-hardt", norms=norms)
    certificate = _certify_cell(cell, method, readout, _assumptions(layer, layout, allowed, start))
    bound = allowed.inputs.bound() if method == "miller-hardt" else math.inf
    return replace(certificate, name=name, layout=layout, input_bound=bound, fingerprint=_fingerprint(layer))


def _fingerprint(layer: nn.Module) -> str:
    """A digest of the tensors the cells of a layer are built from."""
    by_layer = [cell_tensors(layer, number) for number in range(StateLayout.of(layer).layers)]
    found = ((f"{name}_l{n}", t) for n, tensors in enumerate(by_layer) for name, t in tensors.items() if t is not None)
    return tensor_digest((name, tensor.double()) for name, tensor in found)


def _certify_cell(cell: Cell, method: str, readout: Readout, assumptions: tuple[str, ...]) -> Certificate:
    stack = cell if isinstance(cell, StackedCell) else StackedCell([cell])
    if readout.weight is not None and readout.weight.shape[1] != cell.hidden_size:
        raise InputError(
            f"the readout reads {readout.weight.shape[1]} units, but the last layer has {cell.hidden_size}"
        )
    unmet = [_unmet_conditions(layer) if method == "miller-hardt" else () for layer in stack.cells]
    by_layer: list[list[Proof]] = [[] for _ in stack.cells]
    proofs = []
    for name, propagators in _ways(stack.cells, method):
        parts = [Proof.of(name, Stack([propagator])) for propagator in propagators]
        for layer, part in zip(by_layer, parts, strict=True):
            layer.append(part)
        proofs.append(Proof.of_stack(parts, stack if name == "componentwise" else Stack(propagators)))
    certificate = _certificate(proofs, [sentence for layer in unmet for sentence in layer], assumptions, readout, stack)
    if len(stack.cells) == 1:
        return certificate
    layers = (
        _certificate(found, missing, assumptions, Readout(), StackedCell([cell]))
        for found, missing, cell in zip(by_layer, unmet, stack.cells, strict=True)
    )
    return replace(certificate, layers=tuple(layers))


def _ways(cells: Sequence[Cell], method: str) -> Iterator[tuple[str, Sequence[Propagator]]]:
    """The ways to bound the error of a stack that `method` allows: their names, and one propagator a layer."""
    if method == "miller-hardt":
        yield method, [miller_hardt(cell) for cell in cells]
    if method in ("best", "componentwise"):
        yield "componentwise", cells
    rnns = [cell for cell in cells if isinstance(cell, RNNCell)]
    if method == "spectral" and len(rnns) < len(cells):
        kind = next(type(cell).__name__ for cell in cells if not isinstance(cell, RNNCell))
        raise InputError(f"a spectral certificate is about plain RNNs, not {kind}: use method='best'")
    if method in ("best", "spectral") and len(rnns) == len(cells):
        for weights in ([torch.ones_like(cell.slope) for cell in rnns], [balanced_weights(cell) for cell in rnns]):
            below = [None, *weights[:-1]]
            yield "spectral", [euclidean_rnn(*each) for each in zip(rnns, below, weights, strict=True)]


def _certificate(
    proofs: Sequence[Proof], unmet: Sequence[str], assumptions: tuple[str, ...], readout: Readout, cell: StackedCell
) -> Certificate:
    best = min(proofs, key=lambda proof: proof.rate)
    stable = best.contracts and not unmet
    return Certificate(
        stable=stable,
        rate=best.rate if math.isfinite(best.rate) else None,
        method=best.method,
        assumptions=assumptions,
        reasons=() if stable else (*unmet, *_shortfall(best)),
        proofs=tuple(proofs),
        readout=readout,
        cell=cell,
    )


def _shortfall(best: Proof) -> tuple[str, ...]:
    if best.contracts:
        return ()
    if math.isfinite(best.rate):
        return (f"the best bound found on the rate is {best.rate:.6g}, and a certificate needs one below 1",)
    if bool(best.propagator.invariant().isfinite().all()):
        return ("no bound on the rate could be computed: the weights lead out of the range of float64",)
    return (
        "the rate has no bound, because a gate that keeps the state can come arbitrarily close to 1: "
        "say which inputs are allowed (inputs, input_bound or embedding)",
    )


def _joint(certificates: Sequence[Certificate]) -> Certificate:
    """Several recurrent modules in one model: stable if all are; how they are wired is not known, so no horizon."""
    rates = [certificate.rate for certificate in certificates]
    return Certificate(
        stable=all(certificate.stable for certificate in certificates),
        rate=None if None in rates else max(rate for rate in rates if rate is not None),
        method=" + ".join(sorted({certificate.method for certificate in certificates})),
        assumptions=(
            "each of the recurrent modules by itself, as its own certificate says: modules that are not one stack are "
            "certified one by one",
        ),
        reasons=tuple(f"{c.name}: {reason}" for c in certificates for reason in c.reasons),
        layers=tuple(certificates),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What the user said about inputs, start states and readout


@dataclass(frozen=True, eq=False)
class _Allowed:
    """The inputs a layer may read, in a sentence too, and the start state seen with them, if any."""

    inputs: InputSet
    sentence: str
    start: Tensor | tuple[Tensor, Tensor] | None = None


def _allowed(layer: nn.Module, inputs: Any, input_bound: float | None, embedding: Any) -> _Allowed:
    width = int(layer.input_size)  # type: ignore[arg-type]
    if inputs is not None:
        return _data(layer, inputs)
    if input_bound is not None:
        bound = checked_bound(input_bound)
        sentence = f"inputs with every component between {-bound:g} and {bound:g} when they reach the layer"
        return _Allowed(BoxInput.bounded(bound, width), sentence)
    if embedding is not None:
        table = embedding_table(embedding)
        check_points(table, width, "the embedding")
        return _Allowed(PointInput(table), f"sequences of the {len(table):,} rows of the embedding table")
    return _Allowed(AnyInput(), "all inputs")


def checked_bound(input_bound: Any) -> float:
    """A bound on the inputs, or `InputError`."""
    bound = as_number(input_bound)
    if bound is None or bound < 0:
        raise InputError(f"input_bound must be a number of at least 0, got {input_bound!r}")
    return bound


def _data(layer: nn.Module, inputs: Any) -> _Allowed:
    inputs = input_points(inputs, int(layer.input_size))  # type: ignore[arg-type]
    if inputs.dim() == 3:
        batch, steps = inputs.shape[:2] if getattr(layer, "batch_first", False) else inputs.shape[1::-1]
        amount = f"{batch:,} sequence(s) of {steps:,} step(s)"
    else:
        amount = f"{inputs.numel() // inputs.shape[-1]:,} input vectors"
    sentence = f"inputs whose drive U x + b stays, unit by unit, in the range seen in the {amount} given"
    return _Allowed(PointInput(inputs), sentence)


def input_points(inputs: Any, width: int) -> Tensor:
    """Data for a layer that reads `width` features, as a tensor (..., width), or `InputError`."""
    points = inputs.data if isinstance(inputs, PackedSequence) else inputs
    if not isinstance(points, Tensor):
        raise InputError(f"inputs must be a tensor (steps, batch, features), got {type(inputs).__name__}")
    check_points(points, width, "inputs")
    return points


def check_points(points: Tensor, width: int, label: str) -> None:
    """Raise `InputError` unless these are finite vectors of `width` numbers."""
    if not points.is_floating_point():
        raise InputError(f"{label} must hold floating-point vectors, got {points.dtype}: embed the tokens first")
    _check_width(points, width, label)
    if points.numel() == 0:
        raise InputError(f"{label} is empty: give at least one input vector")
    if not points.isfinite().all():
        raise InputError(f"{label} holds NaN or infinite values: remove them first")


def _check_width(points: Tensor, width: int, label: str) -> None:
    """Raise `InputError` unless these are vectors of `width` numbers."""
    if points.dim() == 0 or points.shape[-1] != width:
        raise InputError(f"{label} has shape {tuple(points.shape)}, but the layer reads {width} features")


def embedding_table(embedding: Any) -> Tensor:
    """The rows of an `nn.Embedding` as they are looked up, or a table (V, D) itself."""
    if isinstance(embedding, Tensor):
        return embedding
    if not isinstance(embedding, nn.Embedding):
        raise InputError(f"embedding must be an nn.Embedding or a table (V, D), got {type(embedding).__name__}")
    table = embedding.weight.detach()
    if embedding.max_norm is not None:  # rows are shortened when they are looked up
        norms = torch.linalg.vector_norm(table, embedding.norm_type, dim=1, keepdim=True)
        table = table * (embedding.max_norm / norms.clamp_min(TINY)).clamp_max(1)
    return table


def _capture(model: nn.Module, found: Sequence[tuple[str, nn.Module]], inputs: Any) -> list[_Allowed]:
    """Run the model once in evaluation mode, and keep what reaches each recurrent layer."""
    seen: dict[str, list[Tensor]] = {name: [] for name, _ in found}
    starts: dict[str, list[Any]] = {name: [] for name, _ in found}

    def watch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["input"]
        x = x.data if isinstance(x, PackedSequence) else x
        seen[name].append(x.detach().reshape(-1, x.shape[-1]))
        start = args[1] if len(args) > 1 else kwargs.get("hx")
        if start is not None:
            starts[name].append(start)

    hooks = [layer.register_forward_pre_hook(partial(watch, name), with_kwargs=True) for name, layer in found]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except InputError:
        raise
    except Exception as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"running the model on the inputs failed ({said}): give what its forward takes") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return [_captured(layer, name, seen[name], starts[name]) for name, layer in found]


def _captured(layer: nn.Module, name: str, seen: list[Tensor], starts: list[Any]) -> _Allowed:
    if not seen:
        raise InputError(f"running the model on the inputs never reached its recurrent layer {name!r}")
    states = [StateLayout.of(layer).flatten(start) for start in starts]
    return replace(_data(layer, torch.cat(seen)), start=torch.cat(states) if states else None)


def _range(states: Tensor) -> Interval:
    if len(states) == 0:
        raise InputError("h0 is empty: give at least one start state")
    if not states.isfinite().all():
        raise InputError("h0 holds NaN or infinite values: give finite start states")
    return Interval(states.amin(0), states.amax(0))


def _readout(readout: nn.Module | None) -> Readout:
    if readout is None:
        return Readout()
    linear, log_softmax = readout, False
    if isinstance(readout, nn.Sequential) and len(readout) == 2 and isinstance(readout[1], nn.LogSoftmax):
        linear, log_softmax = readout[0], True
    if not isinstance(linear, nn.Linear):
        raise InputError(
            f"readout must be an nn.Linear or nn.Sequential(linear, nn.LogSoftmax(-1)), got {type(readout).__name__}"
        )
    if not linear.weight.isfinite().all():
        raise InputError("the readout has NaN or infinite weights: give a module with finite weights")
    return Readout(linear.weight.detach().to("cpu", torch.float64), log_softmax)


def _assumptions(layer: nn.Module, layout: StateLayout, allowed: _Allowed, start: Interval | None) -> tuple[str, ...]:
    states = "start states within the invariant bounds, the zero state among them"
    sentences = [allowed.sentence, states if start is None else f"{states}, widened where needed to hold the given h0"]
    if getattr(layer, "dropout", 0) and layout.layers > 1:
        sentences.append("evaluation mode, without dropout between the layers")
    if layer._forward_hooks or layer._forward_pre_hooks:
        sentences.append("what the layer reads and returns within its hooks, not before and behind them")
    sentences.append(
        "the present weights in real arithmetic (computed in float64, ranges widened by 1e-12); "
        "running in float32 adds rounding of about 1e-7 / (1 - rate)"
    )
    return tuple(sentences)
