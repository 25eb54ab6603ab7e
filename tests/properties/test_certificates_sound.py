"""Search for a pair of states and an input that break a certificate: there must be none.

1,000 generated cells of every kind, each with 200 adversarial pairs followed for two steps, and gradient ascent.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unrecurrent.cells import (
    BoxInput,
    CoupledLSTMCell,
    DenseCell,
    GRUCell,
    InputSet,
    Interval,
    LSTMCell,
    ReLURNNCell,
    RNNCell,
    ScaledGateLSTMCell,
    StackedCell,
)

PAIRS = 200
WIDTH = 2
BOUND = 1.5
# Rounding of float64 in step and bound, relative to the size of what is compared.
ROUNDING = 1e-11

KINDS = ("tanh", "relu", "lstm", "coupled", "scaled", "gru", "gru-reset-before")
PATTERNS = ("dense", "diagonal", "triangular", "sparse", "constant sign", "antisymmetric")


def recurrent_weights(pattern: str, gates: int, size: int) -> Tensor:
    blocks = torch.randn(gates, size, size)
    if pattern == "diagonal":
        blocks = torch.diag_embed(blocks.diagonal(dim1=1, dim2=2))
    elif pattern == "triangular":
        blocks = blocks.tril()
    elif pattern == "sparse":
        blocks = blocks * (torch.rand(blocks.shape) < 0.3)
    elif pattern == "constant sign":
        blocks = blocks.abs()
    elif pattern == "antisymmetric":
        blocks = blocks - blocks.mT
    return blocks.reshape(gates * size, size)


def make_cell(kind: str, pattern: str, size: int, scales: tuple[float, ...], inputs: InputSet, width: int) -> DenseCell:
    gates = {"tanh": 1, "relu": 1, "lstm": 4, "coupled": 4, "scaled": 3}.get(kind, 3)
    u_scale, w_scale, b_scale = (10.0**s for s in scales)
    weight_hh = recurrent_weights(pattern, gates, size) * w_scale
    if kind == "relu":  # beyond this a ReLU layer has no bounds to attack
        weight_hh = weight_hh / (1.05 * weight_hh.abs().sum(1).max()).clamp_min(1.0)
    biases = torch.randn(2, gates * size) * b_scale
    weights = [torch.randn(gates * size, width) * u_scale, weight_hh, biases[0], biases[1]]
    if kind == "scaled":
        return ScaledGateLSTMCell(*weights, forget_ceiling=torch.rand(size), inputs=inputs)
    if kind.startswith("gru"):
        return GRUCell(*weights, reset_after=kind == "gru", inputs=inputs)
    classes = {"tanh": RNNCell, "relu": ReLURNNCell, "lstm": LSTMCell, "coupled": CoupledLSTMCell}
    return classes[kind](*weights, inputs=inputs)


def make_stack(kinds: list[str], pattern: str, size: int, scales: tuple[float, ...]) -> StackedCell:
    inputs: InputSet = BoxInput.bounded(BOUND, WIDTH)
    cells: list[DenseCell] = []
    for kind in kinds:
        cells.append(make_cell(kind, pattern, size, scales, inputs, cells[-1].hidden_size if cells else WIDTH))
        inputs = BoxInput(cells[-1].hidden_box())
    return StackedCell(cells)


def adversarial_states(box: Interval, count: int) -> tuple[Tensor, Tensor]:
    """Pairs at corners of the box, inside it, close to each other, and against the zero state."""
    low, high = box.low.clamp(-1e9, 1e9), box.high.clamp(-1e9, 1e9)

    def draw() -> Tensor:
        share = torch.rand(count, len(low), dtype=torch.float64)
        corner = torch.rand(count, 1) < 0.5
        return low + torch.where(corner, share.round(), share) * (high - low)

    first, second = draw(), draw()
    closeness = 10.0 ** torch.empty(count, 1, dtype=torch.float64).uniform_(-4, 0)
    second = first + closeness * (second - first)
    second[: count // 4] = 0
    return first, second


def adversarial_inputs(count: int) -> Tensor:
    share = torch.empty(count, WIDTH, dtype=torch.float64).uniform_(-1, 1)
    return BOUND * torch.where(torch.rand(count, 1) < 0.5, share.sign(), share)


def violation(cell: StackedCell, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """How much more the two states differ after a step than T allows, beyond rounding (N, state_size)."""
    after, other = cell.step(x, first), cell.step(x, second)
    allowed = cell.propagate((first - second).abs())
    return (after - other).abs() - allowed - ROUNDING * (after.abs() + other.abs() + 1)


cells = st.builds(
    make_stack,
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=2),
    pattern=st.sampled_from(PATTERNS),
    size=st.integers(1, 6),
    scales=st.tuples(st.floats(-2, 1), st.floats(-2, 1), st.floats(-2, 1)),
)


@settings(max_examples=1000, deadline=None)
@given(cell=cells, seed=st.integers(0, 2**31))
def test_no_pair_of_states_breaks_the_error_propagator(cell: StackedCell, seed: int) -> None:
    torch.manual_seed(seed)
    first, second = adversarial_states(cell.invariant_box(), PAIRS)
    x = adversarial_inputs(PAIRS)
    for _ in range(2):
        assert float(violation(cell, x, first, second).max()) <= 0
        first, second = cell.step(x, first), cell.step(x, second)
        box, slack = cell.invariant_box(), ROUNDING * (cell.invariant() + 1)
        assert Interval(box.low - slack, box.high + slack).contains(torch.cat([first, second]))


def ascend(cell: StackedCell, tries: int, steps: int) -> Tensor:
    """Largest |Δ after| / T(|Δ before|) that gradient ascent over pairs of states in the box and inputs finds."""
    box = cell.invariant_box()
    unit = torch.randn(2, tries, cell.state_size, dtype=torch.float64, requires_grad=True)
    raw_x = torch.randn(tries, WIDTH, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([unit, raw_x], lr=0.2)
    worst = torch.tensor(0.0, dtype=torch.float64)
    for _ in range(steps):
        first, second = box.low + torch.sigmoid(unit) * (box.high - box.low)
        x = BOUND * torch.tanh(raw_x)
        before, after = (first - second).abs(), (cell.step(x, first) - cell.step(x, second)).abs()
        ratio = (after - ROUNDING * (cell.invariant() + 1)) / (cell.propagate(before) + 1e-30)
        worst = torch.maximum(worst, ratio.detach().max())
        optimizer.zero_grad()
        (-ratio.amax(-1).sum()).backward()
        optimizer.step()
    return worst


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [["lstm", "gru"], ["tanh", "scaled"]], ids="-".join)
@pytest.mark.parametrize("scale", [-0.5, 0.3])
def test_gradient_ascent_comes_close_to_the_bound_but_not_past_it(kinds: list[str], scale: float) -> None:
    torch.manual_seed(1)
    cell = make_stack(kinds, "dense", 3, (scale, scale, scale))
    worst = float(ascend(cell, tries=40, steps=60))
    assert worst <= 1
    assert worst > 0.5  # an attack that came nowhere near would show nothing


Breaker = Callable[[DenseCell], None]


def _columns(cell: DenseCell) -> None:
    size = cell.hidden_size
    cell.recurrent = torch.cat([block.T for block in cell.recurrent.split(size)])


def _half_the_gate_errors(cell: DenseCell) -> None:
    cell.recurrent = cell.recurrent / 2


@pytest.mark.parametrize("breaker", [_columns, _half_the_gate_errors])
def test_the_attack_finds_a_wrong_propagator(breaker: Breaker) -> None:
    """The search must be able to fail: columns taken for rows, or errors too small by half, are found."""
    torch.manual_seed(0)
    found = 0.0
    for kind in ("tanh", "lstm", "scaled"):
        cell = make_stack([kind], "dense", 4, (0.0, 0.0, 0.0))
        breaker(cell.cells[0])
        first, second = adversarial_states(cell.invariant_box(), 20 * PAIRS)
        worst = float(violation(cell, adversarial_inputs(20 * PAIRS), first, second).max())
        assert worst > 0
        found = max(found, worst)
    assert found > 0.01
