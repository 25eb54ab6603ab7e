"""What a recurrence is: its state, one step, bounds on the state, and how an error in the state spreads.

A `Cell` is one recurrence s_t = φ(s_{t-1}, x_t) together with two proved facts about it, both component by component:

* `invariant()` bounds |s_t| for every state the cell can reach, whatever allowed inputs it reads;
* `propagate(e)` is the error propagator T: if two states differ by at most `e`, then one step later, after the same
  input, they differ by at most T(e). T is monotone and positively homogeneous.

Rates, horizons and error bounds of parallel evaluation all follow from those two; `docs/certificates.md` derives the
formulas used here. Everything is computed in float64 on the CPU. `docs/certificates.md` also shows how to write a cell
of your own, with minGRU as the example.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unrecurrent.errors import InputError
from unrecurrent.stock import is_replaced

# Computed ranges are widened by this much, relative to the terms that were added up, which covers float64 rounding.
ROUNDING_MARGIN = 1e-12
# The range of a tanh is cut into this many pieces; slope and value are bounded together on each (see `_Tanh`).
TANH_PIECES = 16
# The bounds on the state are tightened until they stop shrinking, or this many times.
INVARIANT_STEPS = 500
INVARIANT_TOLERANCE = 1e-12
# Steps of the search for a weighted Euclidean norm in which an RNN contracts.
BALANCE_STEPS = 60
BALANCE_VECTORS = 8
# Rows of data or of an embedding table that are multiplied by the input weights at a time.
CHUNK = 4096
# Rows among which repeats are looked for at a time.
BLOCK = 2**17
TINY = 1e-300


@dataclass(frozen=True)
class Interval:
    """Lower and upper bounds, component by component: low ≤ value ≤ high.

    >>> Interval(torch.tensor([-1.0]), torch.tensor([0.5])).magnitude
    tensor([1.])
    """

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """The largest absolute value in the interval."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def map(self, increasing: Callable[[Tensor], Tensor]) -> "Interval":
        """The image under an increasing function."""
        return Interval(increasing(self.low), increasing(self.high))

    def hull(self, other: "Interval") -> "Interval":
        """The smallest interval that contains both."""
        return Interval(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def contains(self, values: Tensor) -> bool:
        """Whether all rows of `values` (..., n) lie in the interval (n,); NaN never does."""
        if not values.numel():
            return True
        rows = values.reshape(-1, values.shape[-1])
        return bool(((rows.amin(0) >= self.low) & (rows.amax(0) <= self.high)).all())  # NaN, where there is one

    def split(self, size: int) -> tuple["Interval", ...]:
        """Consecutive intervals of `size` components each."""
        return tuple(map(Interval, self.low.split(size), self.high.split(size)))

    def is_finite(self) -> bool:
        return bool(self.low.isfinite().all() and self.high.isfinite().all())

    @staticmethod
    def around_zero(bound: Tensor) -> "Interval":
        return Interval(-bound, bound)


def _sum(a: Interval, b: Interval) -> Interval:
    margin = ROUNDING_MARGIN * (a.magnitude + b.magnitude).nan_to_num(posinf=0.0)
    return Interval(a.low + b.low - margin, a.high + b.high + margin)


def _image(weight: Tensor, magnitude: Tensor, x: Interval) -> Interval:
    """The range of `weight @ x`; `magnitude` is |weight|, passed in because callers keep it."""
    centre = weight @ ((x.low + x.high) / 2)
    radius = magnitude @ ((x.high - x.low) / 2)
    margin = ROUNDING_MARGIN * (magnitude @ x.magnitude)
    return Interval(centre - radius - margin, centre + radius + margin)


def _gated(gate: Interval, x: Interval) -> Interval:
    """The range of g·x for a gate 0 ≤ g and any x."""
    low = torch.where(x.low >= 0, gate.low, gate.high) * x.low
    high = torch.where(x.high >= 0, gate.high, gate.low) * x.high
    return Interval(low, high)


def _times(bound: Tensor, e: Tensor) -> Tensor:
    """bound · e where 0 · ∞ = 0: no error, no change, however large the state."""
    return torch.where(e == 0, torch.zeros_like(e), bound * e)


def largest_gated(gate: Interval, a: Tensor, b: Tensor, ceiling: Tensor | float = 1.0) -> Tensor:
    """Largest value of f·a + f(1 − f/F)·b over gate values f in `gate`, for b ≥ 0 and a gate f = F σ(·).

    It is the change of a product f·u when u changes by `a` and |u| times the change of the gate's pre-activation is
    `b`. The function is concave in f, so the maximum is at f* = F(a + b)/(2b) clipped to the range, and for b = 0 at
    the upper end where a ≥ 0 and at the lower end elsewhere (docs/certificates.md).

    >>> half = torch.tensor(0.5); gate = Interval(0 * half, 2 * half)
    >>> largest_gated(gate, 0 * half, 2 * half)
    tensor(0.2500)
    """
    vertex = ceiling * (a + b) / (2 * b).clamp_min(TINY)
    vertex = torch.where(b > 0, vertex, torch.where(a >= 0, math.inf, -math.inf))
    f = torch.minimum(torch.maximum(vertex, gate.low), gate.high)
    value = f * a + f * (1 - f / ceiling) * b
    return torch.where(b.isinf(), math.inf, value)


class _Tanh:
    """The range of a tanh in pieces: on each, how steep it can be and which values it can take.

    Where tanh is steep its value is small, and where its value is large it is flat. A product such as i·tanh(a) changes
    by i·slope·|Δa| + |tanh(a)|·|Δi|: bounding the two factors separately over the whole range adds a steep slope to a
    large value, which never meet. Bounding them piece by piece, and taking the worst piece, does not.
    """

    def __init__(self, argument: Interval) -> None:
        ends = argument.map(torch.tanh)
        steps = torch.linspace(0, 1, TANH_PIECES + 1, dtype=torch.float64).unsqueeze(1)
        edges = ends.low + steps * (ends.high - ends.low)
        edges[-1] = ends.high
        self.ends = ends
        self.pieces = Interval(edges[:-1], edges[1:])
        smallest = torch.maximum(self.pieces.low, -self.pieces.high).clamp_min(0)
        # 1e-15: near saturation 1 - t² is known to float64 rounding only.
        self.slope = (1 - smallest * smallest + 1e-15).clamp_max(1)
        self.magnitude = self.pieces.magnitude

    def distance_to(self, x: Interval) -> Tensor:
        """Largest |x − t| for t in each piece."""
        return torch.maximum(x.high - self.pieces.low, self.pieces.high - x.low)


def _worst_piece(values: Tensor) -> Tensor:
    return values.amax(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Which inputs a certificate is about


class InputSet(ABC):
    """The inputs a layer may read; all that a certificate needs of them is the range of U x + b."""

    @abstractmethod
    def project(self, weight: Tensor, bias: Tensor) -> Interval:
        """Range of `weight @ x + bias` over the set; weight (N, D), bias (N,)."""

    @abstractmethod
    def bound(self) -> float:
        """Largest |x| of any component of any input of the set."""


class AnyInput(InputSet):
    """No restriction at all."""

    def project(self, weight: Tensor, bias: Tensor) -> Interval:
        reach = torch.where((weight != 0).any(1), math.inf, 0.0).to(bias)
        return Interval(bias - reach, bias + reach)

    def bound(self) -> float:
        return math.inf


class BoxInput(InputSet):
    """Inputs whose components lie in given ranges: what a bound ‖x‖_∞ says, or the layer below allows."""

    def __init__(self, box: Interval) -> None:
        self.box = box.map(_float64)

    @classmethod
    def bounded(cls, bound: float, size: int) -> "BoxInput":
        """All inputs (size,) with ‖x‖_∞ ≤ bound."""
        return cls(Interval.around_zero(torch.full((size,), bound, dtype=torch.float64)))

    def project(self, weight: Tensor, bias: Tensor) -> Interval:
        if not self.box.is_finite():
            return AnyInput().project(weight, bias)
        return _sum(_image(weight, weight.abs(), self.box), Interval(bias, bias))

    def bound(self) -> float:
        return float(self.box.magnitude.max())


class PointInput(InputSet):
    """A finite set of inputs, `points` (N, D): data, or the rows of an embedding table; the range is exact."""

    def __init__(self, points: Tensor) -> None:
        self.points = points.detach().reshape(-1, points.shape[-1])

    def project(self, weight: Tensor, bias: Tensor) -> Interval:
        low = torch.full_like(bias, math.inf)
        high = torch.full_like(bias, -math.inf)
        largest = torch.zeros(weight.shape[1], dtype=torch.float64)
        for points in self.points.split(CHUNK):
            points = _float64(points)
            values = points @ weight.T
            low = torch.minimum(low, values.amin(0))
            high = torch.maximum(high, values.amax(0))
            largest = torch.maximum(largest, points.abs().amax(0))
        margin = ROUNDING_MARGIN * (weight.abs() @ largest)
        return _sum(Interval(low - margin, high + margin), Interval(bias, bias))

    def bound(self) -> float:
        return max(float(points.abs().max()) for points in self.points.split(CHUNK))


def _float64(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def distinct(rows: Tensor) -> Tensor:
    """Return the rows (N, D) less those that repeat others bit for bit, or all of them where that would save little.

    Words and chords repeat: rows of an embedding table are far fewer than words of a text. Rows with one sum of their
    bits are taken for the same and then compared, so that no row is left out that differs.
    """
    bits = rows.resolve_neg().contiguous().view(_WHOLE[rows.element_size()])
    sums, kind = _sums_of_bits(bits).unique(return_inverse=True)
    if 2 * len(sums) > len(rows):
        return rows
    first = torch.empty_like(sums).scatter_(0, kind, torch.arange(len(rows), device=rows.device))
    alike = all(torch.equal(part, bits[first[k]]) for part, k in zip(bits.split(CHUNK), kind.split(CHUNK), strict=True))
    return rows[first] if alike else rows


#: whole numbers of so many bytes
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sums_of_bits(bits: Tensor) -> Tensor:
    """A number for each row of whole numbers (N, D): their sum with random weights, which wraps around."""
    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(2**62, (bits.shape[1],), generator=generator, device="cpu").to(bits.device)
    return torch.cat([(part.long() * weights).sum(1) for part in bits.split(CHUNK)])


# ---------------------------------------------------------------------------------------------------------------------
# Error propagators


class Propagator(ABC):
    """How an error spreads: a monotone, positively homogeneous map T of non-negative vectors, and its start.

    `known_weights` `(state_size,)`, where a layer brings them, are the weights of a norm in which it is known to
    contract: the search for a rate begins there.
    """

    known_weights: Tensor | None = None

    @property
    @abstractmethod
    def state_size(self) -> int:
        """Length of the error vector."""

    @abstractmethod
    def invariant(self) -> Tensor:
        """Largest error there can be against the zero state (state_size,)."""

    @abstractmethod
    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        """Error one step later, T(e); `input_error` bounds the change of the layer's own input (None: no change)."""

    def jacobian(self, e: Tensor) -> Tensor:
        """The derivative of T at e > 0, (state_size, state_size): the linear map below T that meets it at e."""
        return torch.autograd.functional.jacobian(self.propagate, e, vectorize=True)

    @abstractmethod
    def hidden(self, e: Tensor) -> Tensor:
        """The part of an error vector that bounds the output h of the (last) layer."""

    def components(self, e: Tensor) -> Tensor:
        """Bounds component by component, every unit of the (last) layer's output h among them."""
        return self.hidden(e)

    @abstractmethod
    def readout(self, weight: Tensor) -> Tensor:
        """The matrix that turns `hidden(e)` into bounds on the change of `weight @ h`, row by row."""


class Cell(Propagator):
    """One recurrence: its state, one step, and the two bounds that certificates are made of.

    Subclass it to certify a cell of your own: set `hidden_size`, `parts` (names of the parts of the state, each
    `hidden_size` long, h last), and write `step`, `invariant` and `propagate`. States and errors are float64 vectors
    (state_size,), the parts one behind the other. `docs/certificates.md` does it for minGRU.

    >>> from unrecurrent import certify
    >>> class Average(Cell):
    ...     hidden_size = 2
    ...     keep = torch.tensor([0.5, 0.9], dtype=torch.float64)
    ...
    ...     def step(self, x, state):
    ...         return self.keep * state + (1 - self.keep) * x.tanh()
    ...
    ...     def invariant(self):
    ...         return torch.ones(2, dtype=torch.float64)
    ...
    ...     def propagate(self, e, input_error=None):
    ...         return self.keep * e + (1 - self.keep) * (0 if input_error is None else input_error)
    >>> certificate = certify(Average())
    >>> round(certificate.rate, 6), certificate.horizon(0.01)
    (0.9, 44)
    """

    hidden_size: int
    parts: tuple[str, ...] = ("h",)

    @property
    def state_size(self) -> int:
        return len(self.parts) * self.hidden_size

    @abstractmethod
    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """The plain step φ: input (..., D) and state (..., state_size) to the next state (..., state_size)."""

    def hidden(self, e: Tensor) -> Tensor:
        return e[..., -self.hidden_size :]

    def readout(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def invariant_box(self) -> Interval:
        """Lower and upper bounds on every state reached; symmetric unless the cell knows better."""
        return Interval.around_zero(self.invariant())


class Stack(Propagator):
    """Error propagators of layers on top of each other; the error vector holds layer 0 first.

    The input of layer l changes with the *new* hidden error of layer l − 1, so T of the stack is block-triangular.
    """

    def __init__(self, layers: Sequence[Propagator]) -> None:
        if not layers:
            raise InputError("a stack needs at least one layer: give a non-empty list of cells")
        self.layers = tuple(layers)
        self.sizes = [layer.state_size for layer in self.layers]

    @property
    def state_size(self) -> int:
        return sum(self.sizes)

    def invariant(self) -> Tensor:
        return torch.cat([layer.invariant() for layer in self.layers])

    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        new = []
        for layer, part in zip(self.layers, e.split(self.sizes, -1), strict=True):
            new.append(layer.propagate(part, input_error))
            input_error = layer.hidden(new[-1])
        return torch.cat(new, -1)

    def hidden(self, e: Tensor) -> Tensor:
        return self.layers[-1].hidden(e[..., -self.sizes[-1] :])

    def components(self, e: Tensor) -> Tensor:
        return self.layers[-1].components(e[..., -self.sizes[-1] :])

    def readout(self, weight: Tensor) -> Tensor:
        return self.layers[-1].readout(weight)


class StackedCell(Stack, Cell):
    """Cells on top of each other, as one cell; the state holds layer 0 first, each layer its parts in their order.

    >>> below = RNNCell(torch.eye(2), torch.eye(2) / 2, inputs=BoxInput.bounded(1.0, 2))
    >>> above = RNNCell(torch.eye(2), torch.eye(2) / 2, inputs=BoxInput(below.hidden_box()))
    >>> StackedCell([below, above]).propagate(torch.ones(4, dtype=torch.float64))
    tensor([0.5000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """

    def __init__(self, cells: Sequence[Cell]) -> None:
        super().__init__(cells)
        self.cells = tuple(cells)
        self.hidden_size = cells[-1].hidden_size
        self.parts = tuple(f"{part}{n}" for n, cell in enumerate(cells) for part in cell.parts)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        new = []
        for cell, part in zip(self.cells, state.split(self.sizes, -1), strict=True):
            new.append(cell.step(x, part))
            x = cell.hidden(new[-1])
        return torch.cat(new, -1)

    def invariant_box(self) -> Interval:
        boxes = [cell.invariant_box() for cell in self.cells]
        return Interval(torch.cat([box.low for box in boxes]), torch.cat([box.high for box in boxes]))


# ---------------------------------------------------------------------------------------------------------------------
# The cells of torch.nn and their relatives


class DenseCell(Cell):
    """What the cells with dense weights share: weights, drive range, and bounds on the state tightened by iteration.

    `weight_ih` (G·H, D) and `weight_hh` (G·H, H) hold the rows of the G gates in torch's order, and so do the biases
    (G·H,). `inputs` is the set of inputs allowed (default: any). `start` bounds the start states; the zero state is
    always among them.
    """

    gates: int

    def __init__(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        *,
        inputs: InputSet | None = None,
        start: Interval | None = None,
    ) -> None:
        self.hidden_size = weight_hh.shape[1]
        rows = self.gates * self.hidden_size
        if weight_hh.shape[0] != rows or weight_ih.shape[0] != rows:
            raise InputError(
                f"{type(self).__name__} with {self.hidden_size} units needs weights of {rows} rows, "
                f"but weight_ih has {weight_ih.shape[0]} and weight_hh {weight_hh.shape[0]}"
            )
        # Copies: the bounds below are about the weights as they are now, whatever becomes of the module's.
        self.weight_ih, self.weight_hh = _float64(weight_ih).clone(), _float64(weight_hh).clone()
        zeros = torch.zeros(rows, dtype=torch.float64)
        self.bias_ih, self.bias_hh = (zeros if b is None else _float64(b).clone() for b in (bias_ih, bias_hh))
        self.recurrent = self.weight_hh.abs()
        inputs = inputs or AnyInput()
        self.drive = inputs.project(self.weight_ih, self.drive_bias())
        zero = torch.zeros(self.state_size, dtype=torch.float64)
        self.start = Interval(zero, zero) if start is None else start.hull(Interval(zero, zero))
        self.input_bound = inputs.bound()
        self.box = self._tighten(self._first_box())
        self._bound_gates()

    @cached_property
    def input_magnitude(self) -> Tensor:
        return self.weight_ih.abs()

    def drive_bias(self) -> Tensor:
        """The part of the biases that is added to U x, whatever the state: both biases, which add up."""
        return self.bias_ih + self.bias_hh

    @abstractmethod
    def _image_of(self, box: Interval) -> Interval:
        """A box that holds the next state for every state in `box`; nested boxes have nested images."""

    @abstractmethod
    def _bound_gates(self) -> None:
        """Keep the ranges that `propagate` needs, for states in `self.box`."""

    def _first_box(self) -> Interval:
        """An invariant box to start from; all parts lie in [−1, 1] unless a start state does not."""
        one = torch.ones(self.state_size, dtype=torch.float64)
        return Interval.around_zero(one).hull(self.start)

    def _tighten(self, box: Interval) -> Interval:
        """Replace an invariant box by its image (and the start states) while that shrinks it: each is invariant."""
        for _ in range(INVARIANT_STEPS):
            image = self._image_of(box).hull(self.start)
            shrink = torch.maximum(image.low - box.low, box.high - image.high)
            settled = not bool((shrink > INVARIANT_TOLERANCE * image.magnitude).any())
            box = image
            if settled:
                break
        return box

    def _preactivations(self, hidden: Interval) -> tuple[Interval, ...]:
        """Range of every gate's pre-activation for hidden states in `hidden`."""
        total = _sum(self.drive, _image(self.weight_hh, self.recurrent, hidden))
        return total.split(self.hidden_size)

    def _moved(self, hidden_error: Tensor, input_error: Tensor | None) -> tuple[Tensor, ...]:
        """How far each gate's pre-activation can move: |W| e_h + |U| e_input."""
        moved = hidden_error @ self.recurrent.T
        if input_error is not None:
            moved = moved + input_error @ self.input_magnitude.T
        return moved.split(self.hidden_size, -1)

    @abstractmethod
    def _spread(self, e: Tensor, moved: Sequence[Tensor]) -> Tensor:
        """T(e) from how far each gate's pre-activation moves; every unit looks at its own entries only."""

    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        return self._spread(e, self._moved(self.hidden(e), input_error))

    @torch.enable_grad()
    def jacobian(self, e: Tensor) -> Tensor:
        """`Propagator.jacobian`, from slopes unit by unit and W: one backward pass for each part of the state."""
        parts = [part.clone().requires_grad_() for part in e.split(self.hidden_size)]
        moved = [part.clone().requires_grad_() for part in self._moved(self.hidden(e), None)]
        spread, rows = self._spread(torch.cat(parts), moved), []
        for part in spread.split(self.hidden_size):
            slopes = torch.autograd.grad(part.sum(), [*parts, *moved], retain_graph=True, materialize_grads=True)
            own, by_gate = slopes[: len(parts)], torch.cat(slopes[len(parts) :]).unsqueeze(1) * self.recurrent
            blocks = [torch.diag(slope) for slope in own]
            blocks[-1] += by_gate.view(-1, self.hidden_size, self.hidden_size).sum(0)
            rows.append(torch.cat(blocks, 1))
        return torch.cat(rows)

    def _linear(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        total = x @ self.weight_ih.T + self.bias_ih + hidden @ self.weight_hh.T + self.bias_hh
        return total.split(self.hidden_size, -1)

    def allows(self, x: Tensor) -> bool:
        """Whether the drive of all inputs x (..., D) stays in the range the bounds were made for."""
        if not bool((self.drive.low.isfinite() | self.drive.high.isfinite()).any()):
            return bool(x.isfinite().all())
        blocks = x.detach().reshape(-1, x.shape[-1]).split(BLOCK)
        parts = (part for block in blocks for part in distinct(block).split(CHUNK))
        return all(self.drive.contains(_float64(part) @ self.weight_ih.T + self.drive_bias()) for part in parts)

    def hidden_box(self) -> Interval:
        """Lower and upper bounds on the hidden state: what the next layer reads."""
        return Interval(self.hidden(self.box.low), self.hidden(self.box.high))

    def invariant_box(self) -> Interval:
        return self.box

    def invariant(self) -> Tensor:
        return self.box.magnitude


class RNNCell(DenseCell):
    """h' = tanh(U x + W h + b): T(e) = L ⊙ |W| e, L the largest slope of each tanh over its range.

    >>> cell = RNNCell(torch.zeros(1, 1), torch.full((1, 1), -0.5))
    >>> cell.propagate(torch.ones(1, dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """

    gates = 1

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self._linear(x, state)[0])

    def _image_of(self, box: Interval) -> Interval:
        return self._preactivations(box)[0].map(torch.tanh)

    def _bound_gates(self) -> None:
        (argument,) = self._preactivations(self.box)
        smallest = torch.maximum(argument.low, -argument.high).clamp_min(0)
        self.slope = torch.cosh(smallest).pow(-2)

    def _spread(self, e: Tensor, moved: Sequence[Tensor]) -> Tensor:
        return self.slope * moved[0]


class ReLURNNCell(RNNCell):
    """h' = max(0, U x + W h + b): T(e) = L ⊙ |W| e, with L = 0 for units that never switch on.

    Its state is bounded where the inputs are and the positive part of W contracts; otherwise the bounds are infinite.
    """

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        return self._linear(x, state)[0].relu()

    def _first_box(self) -> Interval:
        """h̄ = W⁺ h̄ + p solves for the smallest bound that reproduces itself; p is the largest push from outside."""
        positive = self.weight_hh.clamp_min(0)
        push = self.drive.high + self.weight_hh.clamp_max(0) @ self.start.low
        push = torch.maximum(push.relu(), self.start.high)
        high = _solve_bound(positive, push) if push.isfinite().all() else None
        if high is None:
            high = torch.full_like(push, math.inf)
        return Interval(self.start.low, high)

    def _tighten(self, box: Interval) -> Interval:
        return super()._tighten(box) if box.is_finite() else box

    def _image_of(self, box: Interval) -> Interval:
        return self._preactivations(box)[0].map(torch.relu)

    def _bound_gates(self) -> None:
        if self.box.is_finite():
            self.slope = (self._preactivations(self.box)[0].high > 0).to(torch.float64)
        else:
            self.slope = torch.ones(self.hidden_size, dtype=torch.float64)


def _solve_bound(matrix: Tensor, push: Tensor) -> Tensor | None:
    """A non-negative h with matrix @ h + push ≤ h, checked, or None where there is none; matrix is non-negative."""
    slack = 1e-9 * push.max()
    identity = torch.eye(len(push), dtype=torch.float64)
    solution, singular = torch.linalg.solve_ex(identity - matrix, push + slack)
    holds = (solution >= 0) & (matrix @ solution + push <= solution)
    return solution if singular == 0 and bool(holds.all()) else None


class LSTMCell(DenseCell):
    """torch's LSTM (gates i, f, z, o): c' = f c + i z, h' = o tanh(c'); state (c, h).

    With w_g = |W_g| e_h, t = tanh(·) of the candidate or of c', and m the maximum of `largest_gated`:
    e_c' = m(f; e_c, c̄ w_f) + m(i; (1 − t²) w_z, |t| w_i) and e_h' = m(o; (1 − t²) e_c', |t| w_o),
    each at the worst piece of t's range. c̄ = ī z̄ / (1 − f̄): no certificate unless the forget drive is bounded.

    >>> cell = LSTMCell(torch.zeros(4, 1), torch.zeros(4, 1), inputs=BoxInput.bounded(1.0, 1))
    >>> cell.propagate(torch.ones(2, dtype=torch.float64))
    tensor([0.5000, 0.2500], dtype=torch.float64)
    """

    gates = 4
    parts = ("c", "h")

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        c, h = state.split(self.hidden_size, -1)
        i, f, z, o = self._linear(x, h)
        c = f.sigmoid() * c + i.sigmoid() * z.tanh()
        return torch.cat([c, o.sigmoid() * c.tanh()], -1)

    def _first_box(self) -> Interval:
        h = self._start_of_h()
        return _join(self._cells_within(h), h)

    def _start_of_h(self) -> Interval:
        one = torch.ones(self.hidden_size, dtype=torch.float64)
        return Interval.around_zero(one).hull(self.start.split(self.hidden_size)[1])

    def _cells_within(self, hidden: Interval) -> Interval:
        """The cell states reached, for hidden states in `hidden`: c̄ = ī z̄ / (1 − f̄), with 1 − σ(a) as σ(−a)."""
        i, f, z, _ = self._preactivations(hidden)
        added = _gated(i.map(torch.sigmoid), z.map(torch.tanh))
        kept = torch.sigmoid(-f.high)
        reach = Interval(-_ratio(-added.low, kept), _ratio(added.high, kept))
        return reach.hull(self.start.split(self.hidden_size)[0])

    def _image_of(self, box: Interval) -> Interval:
        hidden = box.split(self.hidden_size)[1]
        c = self._cells_within(hidden)
        o = self._preactivations(hidden)[3]
        return _join(c, _gated(o.map(torch.sigmoid), c.map(torch.tanh)))

    def _bound_gates(self) -> None:
        c, h = self.box.split(self.hidden_size)
        i, f, z, o = self._preactivations(h)
        self.input_gate, self.forget_gate, self.output_gate = (gate.map(torch.sigmoid) for gate in (i, f, o))
        self.candidate, self.output = _Tanh(z), _Tanh(c)
        self.largest_c = c.magnitude

    def _spread(self, e: Tensor, moved: Sequence[Tensor]) -> Tensor:
        e_c = e[..., : self.hidden_size]
        w_i, w_f, w_z, w_o = moved
        kept = largest_gated(self.forget_gate, e_c, _times(self.largest_c, w_f))
        e_c = kept + _largest_product(self.input_gate, self.candidate, w_z, w_i)
        return torch.cat([e_c, _largest_product(self.output_gate, self.output, e_c, w_o)], -1)


def _largest_product(gate: Interval, tanh: _Tanh, argument_error: Tensor, gate_error: Tensor) -> Tensor:
    """Largest change of g·tanh(a) when a moves by `argument_error` and the gate's pre-activation by `gate_error`."""
    steep = tanh.slope * argument_error.unsqueeze(-2)
    large = tanh.magnitude * gate_error.unsqueeze(-2)
    return _worst_piece(largest_gated(gate, steep, large))


def _ratio(amount: Tensor, share: Tensor) -> Tensor:
    """max(amount, 0) / share, with 0 / 0 = 0."""
    amount = amount.clamp_min(0)
    return torch.where(amount == 0, 0.0, amount / share)


def _join(*parts: Interval) -> Interval:
    return Interval(torch.cat([part.low for part in parts]), torch.cat([part.high for part in parts]))


class ScaledGateLSTMCell(DenseCell):
    """Coupled LSTM with a scaled forget gate (gates f, z, o): f = F̄ σ(a_f), c' = f c + (1 − f) z, h' = o tanh(c').

    The update is a convex combination, so |c| ≤ z̄ is invariant, and since df/da = f (1 − f/F̄),
    e_c' = max over f of n + f (e_c − n) + f (1 − f/F̄) |c − z| w_f with n = (1 − z²) w_z, at the worst piece of z.

    >>> cell = ScaledGateLSTMCell(torch.zeros(3, 1), torch.zeros(3, 1), forget_ceiling=torch.tensor([0.5]))
    >>> cell.propagate(torch.ones(2, dtype=torch.float64))
    tensor([0.2500, 0.1250], dtype=torch.float64)
    """

    gates = 3
    parts = ("c", "h")

    def __init__(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        *,
        forget_ceiling: Tensor,
        inputs: InputSet | None = None,
        start: Interval | None = None,
    ) -> None:
        if not bool(((forget_ceiling >= 0) & (forget_ceiling <= 1)).all()):
            raise InputError("forget ceilings lie between 0 and 1: give a layer, or forget_ceiling, that keeps to that")
        self.ceiling = _float64(forget_ceiling).clamp_min(TINY)
        super().__init__(weight_ih, weight_hh, bias_ih, bias_hh, inputs=inputs, start=start)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        c, h = state.split(self.hidden_size, -1)
        f, z, o = self._linear(x, h)
        f = self.ceiling * f.sigmoid()
        c = f * c + (1 - f) * z.tanh()
        return torch.cat([c, o.sigmoid() * c.tanh()], -1)

    def _image_of(self, box: Interval) -> Interval:
        start_c, hidden = self.start.split(self.hidden_size)[0], box.split(self.hidden_size)[1]
        _, z, o = self._preactivations(hidden)
        c = z.map(torch.tanh).hull(start_c)
        return _join(c, _gated(o.map(torch.sigmoid), c.map(torch.tanh)))

    def _bound_gates(self) -> None:
        c, h = self.box.split(self.hidden_size)
        f, z, o = self._preactivations(h)
        self.forget_gate = Interval(self.ceiling * f.low.sigmoid(), self.ceiling * f.high.sigmoid())
        self.output_gate = o.map(torch.sigmoid)
        self.candidate, self.output = _Tanh(z), _Tanh(c)
        self.distance = self.candidate.distance_to(c)

    def _spread(self, e: Tensor, moved: Sequence[Tensor]) -> Tensor:
        e_c = e[..., : self.hidden_size]
        w_f, w_z, w_o = moved
        e_c = _largest_mixture(self.forget_gate, self.candidate, w_z, e_c, self.distance, w_f, self.ceiling)
        return torch.cat([e_c, _largest_product(self.output_gate, self.output, e_c, w_o)], -1)


def _largest_mixture(
    gate: Interval,
    tanh: _Tanh,
    argument_error: Tensor,
    kept_error: Tensor,
    distance: Tensor,
    gate_error: Tensor,
    ceiling: Tensor | float = 1.0,
) -> Tensor:
    """Largest change of f·c + (1 − f)·tanh(a) when c moves by `kept_error`, a by `argument_error`, and the gate's
    pre-activation by `gate_error`; `distance` bounds |c − tanh(a)| on each piece of the tanh."""
    new = tanh.slope * argument_error.unsqueeze(-2)
    kept = kept_error.unsqueeze(-2)
    return _worst_piece(new + largest_gated(gate, kept - new, distance * gate_error.unsqueeze(-2), ceiling))


class CoupledLSTMCell(ScaledGateLSTMCell):
    """An ordinary LSTM whose input gate is tied to its forget gate, i = 1 − f: the scaled-gate LSTM with F̄ = 1.

    Takes the weights of an `nn.LSTM` (rows i, f, z, o) in which W_i = −W_f, U_i = −U_f and b_i = −b_f in both biases.
    """

    def __init__(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        *,
        inputs: InputSet | None = None,
        start: Interval | None = None,
    ) -> None:
        size = weight_hh.shape[1]
        rows = [None if t is None else t[size:] for t in (weight_ih, weight_hh, bias_ih, bias_hh)]
        ceiling = torch.ones(size, dtype=torch.float64)
        super().__init__(*rows, forget_ceiling=ceiling, inputs=inputs, start=start)  # type: ignore[arg-type]

    @staticmethod
    def is_tied(*weights: Tensor | None) -> bool:
        """Whether the input-gate rows are exactly the negated forget-gate rows in all weights and biases."""
        present = [w for w in weights if w is not None]
        return all(torch.equal(w.chunk(4)[0], -w.chunk(4)[1]) for w in present)


class GRUCell(DenseCell):
    """GRU (gates r, z, n): h' = (1 − z) ⊙ n + z ⊙ h, in torch's form or, with `reset_after=False`, ONNX's and Keras's.

    torch: n = tanh(U_n x + b_in + r ⊙ (W_n h + b_hn)), e_n = m(r; w_n, |W_n h + b_hn| w_r).
    Reset before the product: n = tanh(U_n x + b_in + b_hn + W_n (r ⊙ h)), e_n = |W_n| m(r; e, h̄ w_r).
    Then e' = max over z of n + z (e − n) + z (1 − z) |h − n| w_z, with the slope of the tanh times e_n as n, at the
    worst piece. A changed input adds |U_n| e_input to e_n, outside the reset gate. Weights are in torch's order.

    >>> cell = GRUCell(torch.zeros(3, 1), torch.zeros(3, 1), inputs=BoxInput.bounded(1.0, 1))
    >>> cell.propagate(torch.ones(1, dtype=torch.float64))
    tensor([0.5000], dtype=torch.float64)
    """

    gates = 3

    def __init__(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None = None,
        bias_hh: Tensor | None = None,
        *,
        reset_after: bool = True,
        inputs: InputSet | None = None,
        start: Interval | None = None,
    ) -> None:
        self.reset_after = reset_after
        super().__init__(weight_ih, weight_hh, bias_ih, bias_hh, inputs=inputs, start=start)
        self.recurrent_rz, self.recurrent_n = self.recurrent.split([2 * self.hidden_size, self.hidden_size])

    def drive_bias(self) -> Tensor:
        """b_hn stands inside the reset gate in torch's form, so it is no part of the drive there."""
        total = self.bias_ih + self.bias_hh
        if self.reset_after:
            total[-self.hidden_size :] = self.bias_ih[-self.hidden_size :]
        return total

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        size = self.hidden_size
        outer = (x @ self.weight_ih.T + self.drive_bias()).split(size, -1)
        weight_rz, weight_n = self.weight_hh.split([2 * size, size])
        r, z = (state @ weight_rz.T).split(size, -1)
        r, z = (outer[0] + r).sigmoid(), (outer[1] + z).sigmoid()
        if self.reset_after:
            n = (outer[2] + r * (state @ weight_n.T + self.bias_hh[2 * size :])).tanh()
        else:
            n = (outer[2] + (r * state) @ weight_n.T).tanh()
        return (1 - z) * n + z * state

    def _gates_within(self, hidden: Interval) -> tuple[Interval, Interval, Interval, Interval]:
        """Ranges of r, z, of the tanh's argument, and of what the reset gate multiplies."""
        size = self.hidden_size
        drive_rz = _join(*self.drive.split(size)[:2])
        weight, magnitude = self.weight_hh, self.recurrent
        r, z = _sum(drive_rz, _image(weight[: 2 * size], magnitude[: 2 * size], hidden)).split(size)
        r, z = r.map(torch.sigmoid), z.map(torch.sigmoid)
        drive_n = self.drive.split(size)[2]
        if self.reset_after:
            bias = self.bias_hh[2 * size :]
            product = _sum(_image(weight[2 * size :], magnitude[2 * size :], hidden), Interval(bias, bias))
            return r, z, _sum(drive_n, _gated(r, product)), product
        inner = _image(weight[2 * size :], magnitude[2 * size :], _gated(r, hidden))
        return r, z, _sum(drive_n, inner), hidden

    def _image_of(self, box: Interval) -> Interval:
        """Old and new state are mixed convexly: what the candidate cannot reach is reached by no state."""
        return self._gates_within(box)[2].map(torch.tanh)

    def _bound_gates(self) -> None:
        self.reset_gate, self.update_gate, argument, product = self._gates_within(self.box)
        self.largest_product = product.magnitude
        self.candidate = _Tanh(argument)
        self.distance = self.candidate.distance_to(self.box)

    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        size = self.hidden_size
        w_r, w_z = (e @ self.recurrent_rz.T).split(size, -1)
        outside = torch.zeros_like(w_r)
        if input_error is not None:
            u_r, u_z, outside = (input_error @ self.input_magnitude.T).split(size, -1)
            w_r, w_z = w_r + u_r, w_z + u_z
        if self.reset_after:
            e_n = largest_gated(self.reset_gate, e @ self.recurrent_n.T, self.largest_product * w_r)
        else:
            e_n = largest_gated(self.reset_gate, e, self.largest_product * w_r) @ self.recurrent_n.T
        return self._mixed(e, e_n + outside, w_z)

    def _spread(self, e: Tensor, moved: Sequence[Tensor]) -> Tensor:
        w_r, w_z, w_n = moved
        return self._mixed(e, largest_gated(self.reset_gate, w_n, self.largest_product * w_r), w_z)

    def _mixed(self, e: Tensor, e_n: Tensor, w_z: Tensor) -> Tensor:
        return _largest_mixture(self.update_gate, self.candidate, e_n, e, self.distance, w_z)

    def jacobian(self, e: Tensor) -> Tensor:
        return super().jacobian(e) if self.reset_after else Propagator.jacobian(self, e)


class NormPropagator(Propagator):
    """An error kept as one number, its norm E = ‖Δ / weights‖ of `order` 2 or infinity; Δ is the change of the state.

    T(E) = gain · E + input_gain · E_input, where E_input is the norm of the layer below. `reach` bounds the norm of a
    reachable state; `weights` (length of the state) are positive.
    """

    def __init__(self, gain: float, input_gain: float, reach: float, order: float, weights: Tensor) -> None:
        self.gain, self.input_gain, self.reach, self.order, self.weights = gain, input_gain, reach, order, weights

    @property
    def state_size(self) -> int:
        return 1

    def invariant(self) -> Tensor:
        return torch.tensor([self.reach], dtype=torch.float64)

    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        return self.gain * e if input_error is None else self.gain * e + self.input_gain * input_error

    def hidden(self, e: Tensor) -> Tensor:
        return e

    def of(self, change: Tensor) -> Tensor:
        """The norm of changes of the state (..., length of the state)."""
        return torch.linalg.vector_norm(change / self.weights, self.order, dim=-1)

    def components(self, e: Tensor) -> Tensor:
        return e * self.weights

    def readout(self, weight: Tensor) -> Tensor:
        dual = 2 if self.order == 2 else 1
        return torch.linalg.vector_norm(weight * self.weights[-weight.shape[1] :], dual, dim=1, keepdim=True)


def euclidean_rnn(cell: RNNCell, below: Tensor | None = None, weights: Tensor | None = None) -> NormPropagator:
    """The error of an RNN in a weighted Euclidean norm: gain ‖D⁻¹ diag(L) W D‖₂, D = diag(weights), by default all 1.

    It sees the signs in W, which the component-wise bound does not, and is often the tighter of the two. `below` holds
    the weights of the layer below, in whose norm the input error comes; its gain is ‖D⁻¹ diag(L) U D_below‖₂.
    """
    weights = torch.ones(cell.hidden_size, dtype=torch.float64) if weights is None else weights
    slope = (cell.slope / weights).unsqueeze(1)
    gain = spectral_norm(slope * cell.weight_hh * weights)
    input_gain = 0.0 if below is None else spectral_norm(slope * cell.weight_ih * below)
    reach = float((cell.invariant() / weights).norm())
    if not math.isfinite(reach) and gain < 1:
        push = float((cell.drive.magnitude / weights).norm())
        reach = max(push / (1 - gain), float((cell.start.magnitude / weights).norm()))
    return NormPropagator(gain, input_gain, reach, order=2, weights=weights)


def balanced_weights(cell: RNNCell) -> Tensor:
    """Weights D (H,) in whose norm the RNN contracts well: they make ‖D⁻¹ M D‖₂ small, M = diag(L) W.

    The derivative of a singular value σ with vectors u, v by log D_j is σ (v_j² − u_j²), so at the best D the squares
    of the leading left and right vectors agree; each step moves D towards that, with several vectors, weighted by σ^40,
    because the leading values run together. Subspace iteration follows the vectors from step to step. Any positive
    weights are sound, so the search need not be exact.
    """
    matrix = cell.slope.unsqueeze(1) * cell.weight_hh
    size, count = len(matrix), min(BALANCE_VECTORS, len(matrix))
    log_d = torch.zeros(size, dtype=torch.float64)
    right = torch.linalg.qr(torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[
        0
    ]
    for step in range(BALANCE_STEPS):
        d = log_d.exp().unsqueeze(1)
        left, values, mix = torch.linalg.svd(matrix @ (d * right) / d, full_matrices=False)
        share = (values / values[0].clamp_min(TINY)) ** 40
        floor = 1e-3 * share.sum().clamp_min(TINY) / size
        balance = (left.square() @ share + floor) / ((right @ mix.mT).square() @ share + floor)
        right = torch.linalg.qr(d * (matrix.T @ (left / d)))[0]
        log_d = log_d + 0.25 * (1 - step / BALANCE_STEPS) * balance.log()
    return (log_d - log_d.mean()).exp()


def spectral_norm(matrix: Tensor) -> float:
    """Largest singular value, rounded up."""
    return float(torch.linalg.matrix_norm(matrix, 2)) * (1 + ROUNDING_MARGIN)


# ---------------------------------------------------------------------------------------------------------------------
# From modules to cells


RECURRENT_LAYERS = (nn.RNN, nn.LSTM, nn.GRU)
RECURRENT_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def is_recurrent(module: nn.Module) -> bool:
    """Whether `module` itself is a recurrent layer we know: torch's, their cells, or one that names its `cell_kind`."""
    return isinstance(module, (*RECURRENT_LAYERS, *RECURRENT_CELLS)) or _kind(module) is not None


def find_recurrent(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The recurrent layers in `module` with their names, in its order, or `InputError` where one cannot be handled.

    A layer found is causal (not bidirectional), has no projection, finite weights, and does what these say.

    >>> [name for name, _ in find_recurrent(nn.Sequential(nn.Linear(2, 3), nn.RNNCell(3, 4)))]
    ['1']
    """
    check_module(module)
    found: list[tuple[str, nn.Module]] = []
    for name, layer in module.named_modules():
        inside = any(layer is not outer and layer in outer.modules() for _, outer in found)
        if is_recurrent(layer) and not inside:
            check_recurrent(layer, name)
            found.append((name, layer))
    if not found:
        raise InputError(
            f"{type(module).__name__} holds no recurrent layer: give an nn.RNN, nn.LSTM, nn.GRU, one of their cells, "
            "or a module that contains one"
        )
    return found


def check_module(module: object) -> None:
    """Raise `InputError` for what is no module."""
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise InputError(f"give a module, such as nn.LSTM(8, 16) or a model that holds one, not {got}")


def check_recurrent(layer: nn.Module, name: str = "") -> None:
    """Raise `InputError` in one sentence for a layer whose weights do not say all it does, or are not finite.

    Hooks are left alone: all is said of the inputs that the layer gets, and of what it makes of them.
    """
    label = f"{type(layer).__name__} {name!r}" if name else type(layer).__name__
    if getattr(layer, "bidirectional", False):
        raise InputError(f"{label} is bidirectional, so its outputs depend on the future: give a one-directional layer")
    if getattr(layer, "proj_size", 0):
        raise InputError(f"{label} has proj_size={layer.proj_size}: give an LSTM without a projection")
    if is_replaced(layer):
        raise InputError(f"{label} has methods of its own, of which its weights say nothing: give the plain layer")
    if any(isinstance(value, Tensor) and key.startswith(("weight", "bias")) for key, value in vars(layer).items()):
        raise InputError(
            f"{label} has weights that a hook makes anew in each call (weight_norm, spectral_norm): remove it, or use"
            " torch.nn.utils.parametrizations"
        )
    if any(value.is_meta for value in layer.parameters()):
        raise InputError(f"{label} is on the meta device, where weights have no values: load them first")
    for tensor, value in (*layer.named_parameters(), *layer.named_buffers()):
        if not value.isfinite().all():
            raise InputError(f"{label} has NaN or infinite values in {tensor}: give a module with finite weights")


def build_cells(
    layer: nn.Module,
    inputs: InputSet,
    start: Interval | None = None,
    *,
    see_ties: bool = True,
    norms: Sequence[Tensor | None] = (),
) -> StackedCell:
    """The cells of a recurrent layer, lowest first; each reads what the bounds on the one below allow.

    `start` bounds the start states (state_size,) of the whole stack. With `see_ties=False` an LSTM whose input gate is
    tied to its forget gate is taken as any other LSTM. `norms` are the `known_weights` of the layers, where there are
    any, as `(parts, H)`.
    """
    layout = StateLayout.of(layer)
    starts = [None] * layout.layers if start is None else start.split(layout.parts * layout.hidden_size)
    cells: list[DenseCell] = []
    for number, layer_start in enumerate(starts):
        cells.append(_build_cell(layer, number, inputs, layer_start, see_ties))
        known = norms[number] if norms else None
        cells[-1].known_weights = None if known is None else _float64(known).flatten()
        inputs = BoxInput(cells[-1].hidden_box())
    return StackedCell(cells)


@dataclass(frozen=True)
class StateLayout:
    """How a module lays out its own state: `layers` × `hidden_size`, in `parts` tensors (2 for (h, c), else 1)."""

    owner: str
    layers: int
    hidden_size: int
    parts: int
    has_layer_dimension: bool

    @classmethod
    def of(cls, layer: nn.Module) -> "StateLayout":
        pair = isinstance(layer, (nn.LSTM, nn.LSTMCell)) or _kind(layer) == "scaled-gate-lstm"
        return cls(
            owner=type(layer).__name__,
            layers=int(getattr(layer, "num_layers", 1)),
            hidden_size=int(layer.hidden_size),  # type: ignore[arg-type]
            parts=2 if pair else 1,
            has_layer_dimension=not isinstance(layer, RECURRENT_CELLS),
        )

    def flatten(self, hx: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """The module's state, h (layers, B, H) or (h, c), as one float64 vector a sequence, (B, state_size).

        Layer 0 comes first, and of each layer c before h. Without batch dimension, (layers, H), B is 1; cells, whose
        state has no dimension for layers, take (B, H) or (H,).

        >>> h = torch.zeros(2, 5, 3)
        >>> StateLayout.of(nn.LSTM(1, 3, 2)).flatten((h, h + 1)).shape
        torch.Size([5, 12])
        """
        parts = [self._as_batch(part) for part in self._in_order(hx)]
        if len({part.shape[1] for part in parts}) > 1:
            raise InputError("h and c have different batch sizes: give one of each for every sequence")
        return torch.cat(parts, -1).transpose(0, 1).flatten(1)

    def _in_order(self, hx: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.parts == 1 and isinstance(hx, Tensor):
            return (hx,)
        if self.parts == 2 and isinstance(hx, tuple | list) and [isinstance(part, Tensor) for part in hx] == [True] * 2:
            return hx[1], hx[0]
        wanted = "one tensor h" if self.parts == 1 else "a pair of tensors (h, c)"
        raise InputError(f"the state of {self.owner} is {wanted}: give it in that form")

    def _as_batch(self, part: Tensor) -> Tensor:
        full = _float64(part if self.has_layer_dimension else part.unsqueeze(0))
        if full.dim() == 2:
            full = full.unsqueeze(1)
        if full.dim() != 3 or (full.shape[0], full.shape[2]) != (self.layers, self.hidden_size):
            raise InputError(
                f"the state has shape {tuple(part.shape)}, but {self.owner} has {self.layers} layer(s) of "
                f"{self.hidden_size} units: give (layers, batch, hidden), or (batch, hidden) for a single cell"
            )
        return full


def cell_tensors(layer: nn.Module, number: int) -> dict[str, Any]:
    """What the cell of layer `number` is built from, by name; a parametrized weight as it is computed."""
    suffix = f"_l{number}" if StateLayout.of(layer).has_layer_dimension else ""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "forget_ceiling")
    return {name: getattr(layer, name + suffix, None) for name in names}


def _build_cell(layer: nn.Module, number: int, inputs: InputSet, start: Interval | None, see_ties: bool) -> DenseCell:
    *weights, ceiling = cell_tensors(layer, number).values()
    if _kind(layer) == "scaled-gate-lstm":
        return ScaledGateLSTMCell(*weights, forget_ceiling=ceiling, inputs=inputs, start=start)
    if isinstance(layer, (nn.LSTM, nn.LSTMCell)):
        lstm = CoupledLSTMCell if see_ties and CoupledLSTMCell.is_tied(*weights) else LSTMCell
        return lstm(*weights, inputs=inputs, start=start)
    if isinstance(layer, (nn.GRU, nn.GRUCell)):
        return GRUCell(*weights, inputs=inputs, start=start)
    rnn = ReLURNNCell if getattr(layer, "nonlinearity", "tanh") == "relu" else RNNCell
    return rnn(*weights, inputs=inputs, start=start)


def _kind(layer: nn.Module) -> str | None:
    """The `cell_kind` that layers outside torch state, so that this file need not import them."""
    kind = getattr(layer, "cell_kind", None)
    return kind if kind == "scaled-gate-lstm" else None
