"""Cells: their steps are torch's, their bounds hold on trajectories, and their closed-form maxima are maxima."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from unrecurrent import cells
from unrecurrent.cells import (
    CHUNK,
    AnyInput,
    BoxInput,
    CoupledLSTMCell,
    GRUCell,
    Interval,
    LSTMCell,
    PointInput,
    ReLURNNCell,
    RNNCell,
    ScaledGateLSTMCell,
    StackedCell,
    StateLayout,
    build_cells,
    distinct,
    find_recurrent,
    largest_gated,
)
from unrecurrent.errors import InputError

H, D, T, B = 5, 3, 63, 4


def tie_input_gate(lstm: nn.LSTM) -> nn.LSTM:
    with torch.no_grad():
        for parameter in lstm.parameters():
            rows = parameter.chunk(4)
            rows[0].copy_(-rows[1])
    return lstm


MODULES = {
    "tanh": lambda layers: nn.RNN(D, H, layers),
    "relu": lambda layers: nn.RNN(D, H, layers, nonlinearity="relu"),
    "lstm": lambda layers: nn.LSTM(D, H, layers),
    "lstm without bias": lambda layers: nn.LSTM(D, H, layers, bias=False),
    "coupled": lambda layers: tie_input_gate(nn.LSTM(D, H, layers)),
    "gru": lambda layers: nn.GRU(D, H, layers),
}


def make(kind: str, layers: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODULES[kind](layers).double()


def run(cell: StackedCell, x: Tensor, state: Tensor) -> Tensor:
    """All states (T, B, state_size) of the plain steps from `state`."""
    states = []
    for x_t in x:
        state = cell.step(x_t, state)
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", MODULES)
def test_steps_are_those_of_the_torch_module(kind: str, layers: int) -> None:
    module = make(kind, layers)
    x = torch.randn(T, B, D, dtype=torch.float64)
    shape = (layers, B, H)
    h0 = torch.rand(shape, dtype=torch.float64)
    hx = (h0, torch.randn(shape, dtype=torch.float64)) if isinstance(module, nn.LSTM) else h0
    cell = build_cells(module, AnyInput())
    layout = StateLayout.of(module)
    states = run(cell, x, layout.flatten(hx))
    outputs, last = module(x, hx)
    torch.testing.assert_close(cell.hidden(states), outputs)
    torch.testing.assert_close(states[-1], layout.flatten(last))


@pytest.mark.parametrize(
    ("cell_class", "wanted"), [(nn.RNNCell, RNNCell), (nn.LSTMCell, LSTMCell), (nn.GRUCell, GRUCell)]
)
def test_single_cells_are_read_too(cell_class: type[nn.Module], wanted: type) -> None:
    module = cell_class(D, H).double()
    x = torch.randn(B, D, dtype=torch.float64)
    cell = build_cells(module, AnyInput())
    assert type(cell.cells[0]) is wanted
    h = torch.rand(B, H, dtype=torch.float64)
    hx = (h, h - 1) if cell_class is nn.LSTMCell else h
    layout = StateLayout.of(module)
    torch.testing.assert_close(cell.step(x, layout.flatten(hx)), layout.flatten(module(x, hx)))


@pytest.mark.parametrize("reset_after", [True, False])
def test_both_reset_forms_are_those_of_onnx(reset_after: bool) -> None:
    onnx = pytest.importorskip("onnx")
    reference = pytest.importorskip("onnx.reference")
    gru = make("gru", 1)
    rows = [t.detach().chunk(3) for t in (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)]
    in_onnx_order = [torch.cat([z, r, n]) for r, z, n in rows]  # ONNX orders the gates z, r, h
    feeds = {
        "X": torch.randn(T, 1, D),
        "W": in_onnx_order[0][None],
        "R": in_onnx_order[1][None],
        "B": torch.cat(in_onnx_order[2:])[None],
    }
    node = onnx.helper.make_node("GRU", list(feeds), ["Y"], hidden_size=H, linear_before_reset=int(reset_after))
    shapes = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape) for n, v in feeds.items()]
    out = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [T, 1, 1, H])
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "gru", shapes, [out]))
    (expected,) = reference.ReferenceEvaluator(model).run(None, {n: v.float().numpy() for n, v in feeds.items()})
    weights = (gru.weight_ih_l0, gru.weight_hh_l0, gru.bias_ih_l0, gru.bias_hh_l0)
    cell = StackedCell([GRUCell(*weights, reset_after=reset_after)])
    states = run(cell, feeds["X"].double(), torch.zeros(1, H, dtype=torch.float64))
    torch.testing.assert_close(states.float(), torch.from_numpy(expected)[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("kind", MODULES)
def test_trajectories_stay_within_the_invariant_bounds(kind: str, scale: float) -> None:
    module = make(kind, 2)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            factor = 0.1 if kind == "relu" and "weight_hh" in name else scale
            parameter.mul_(factor)
    cell = build_cells(module, BoxInput.bounded(2.0, D))
    x = torch.empty(T, 200, D, dtype=torch.float64).uniform_(-2, 2).sign() * 2
    states = run(cell, x, torch.zeros(200, cell.state_size, dtype=torch.float64))
    assert cell.invariant_box().contains(states)
    assert bool((states.abs() <= cell.invariant()).all())


def test_invariant_bounds_are_nearly_reached() -> None:
    """A bound that is far from what can happen would make every horizon too long."""
    cell = LSTMCell(torch.tensor([[0.0], [0.0], [1.0], [0.0]]), torch.zeros(4, 1), inputs=BoxInput.bounded(1.0, 1))
    state = torch.zeros(2, dtype=torch.float64)
    for _ in range(60):
        state = cell.step(torch.ones(1, dtype=torch.float64), state)
    torch.testing.assert_close(state, cell.invariant(), rtol=1e-9, atol=0)


def test_one_minus_the_forget_gate_keeps_its_precision() -> None:
    """In float64 1 − σ(40) is 0; the bound on c, ī z̄ / (1 − f̄), must still be the finite number it is."""
    bias = torch.tensor([0.0, 40.0, 1.0, 0.0])
    cell = LSTMCell(torch.zeros(4, 1), torch.zeros(4, 1), bias)
    expected = 0.5 * math.tanh(1.0) * (1 + math.exp(40.0))
    assert float(cell.invariant()[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ceiling", [1.0, 0.7])
def test_largest_gated_is_the_maximum_over_the_gate(ceiling: float) -> None:
    torch.manual_seed(0)
    n = 2000
    ends = ceiling * torch.rand(2, n, dtype=torch.float64)
    gate = Interval(ends.amin(0), ends.amax(0))
    a = torch.randn(n, dtype=torch.float64)
    b = torch.rand(n, dtype=torch.float64) * torch.tensor([0.0, 0.1, 1.0, 10.0]).repeat(n // 4)
    grid = gate.low + torch.linspace(0, 1, 5001, dtype=torch.float64)[:, None] * (gate.high - gate.low)
    searched = (grid * a + grid * (1 - grid / ceiling) * b).amax(0)
    found = largest_gated(gate, a, b, ceiling)
    assert bool((found >= searched - 1e-12).all())
    torch.testing.assert_close(found, searched, rtol=0, atol=1e-6)


def test_error_rows_are_rows_not_columns() -> None:
    """|W| e sums over a unit's incoming weights, which are the rows of weight_hh in torch's layout."""
    w = torch.tensor([[0.1, 0.2], [0.5, 0.3]])
    moved = RNNCell(torch.zeros(2, 1), w).propagate(torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(moved, torch.tensor([0.3, 0.8], dtype=torch.float64))


def test_the_two_forget_biases_add_up() -> None:
    bias_ih, bias_hh = torch.zeros(4), torch.zeros(4)
    bias_ih[1], bias_hh[1] = 2.0, 3.0
    cell = LSTMCell(torch.zeros(4, 1), torch.zeros(4, 1), bias_ih, bias_hh)
    moved = cell.propagate(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert float(moved[0]) == pytest.approx(1 / (1 + math.exp(-5)), rel=1e-9)


def test_the_bias_of_a_gru_candidate_stands_inside_its_reset_gate() -> None:
    bias_hh = torch.tensor([0.0, 0.0, 3.0])
    ones = torch.ones(3, 1) / 10
    with_bias = GRUCell(ones, ones, None, bias_hh, inputs=BoxInput.bounded(1.0, 1))
    assert float(with_bias.largest_product) == pytest.approx(3.0 + 0.1 * float(with_bias.invariant()), rel=1e-9)


def test_the_tie_is_recognised_exactly() -> None:
    tied = tie_input_gate(nn.LSTM(D, H))
    assert isinstance(build_cells(tied, AnyInput()).cells[0], CoupledLSTMCell)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        nearly = copy.deepcopy(tied)
        with torch.no_grad():
            getattr(nearly, name)[0] += 1e-6
        assert type(build_cells(nearly, AnyInput()).cells[0]) is LSTMCell


def test_a_relu_layer_has_bounds_only_where_it_contracts() -> None:
    inputs = BoxInput.bounded(1.0, 1)
    contracting = ReLURNNCell(torch.ones(1, 1), torch.full((1, 1), 0.5), inputs=inputs)
    assert float(contracting.invariant()) == pytest.approx(2.0, rel=1e-6)
    assert not ReLURNNCell(torch.ones(1, 1), torch.ones(1, 1), inputs=inputs).invariant().isfinite().any()
    assert not ReLURNNCell(torch.ones(1, 1), torch.full((1, 1), 0.5)).invariant().isfinite().any()


def test_relu_units_that_never_switch_on_pass_nothing() -> None:
    cell = ReLURNNCell(torch.ones(1, 1), torch.full((1, 1), 0.5), torch.tensor([-3.0]), inputs=BoxInput.bounded(1.0, 1))
    assert float(cell.propagate(torch.ones(1, dtype=torch.float64))) == 0.0


def test_a_scaled_gate_with_ceiling_one_is_the_coupled_lstm() -> None:
    tied = tie_input_gate(nn.LSTM(D, H))
    inputs = BoxInput.bounded(1.0, D)
    coupled = build_cells(tied, inputs).cells[0]
    rows = [p[H:] for p in tied.parameters()]
    scaled = ScaledGateLSTMCell(*rows, forget_ceiling=torch.ones(H), inputs=inputs)
    e = torch.rand(2 * H, dtype=torch.float64)
    torch.testing.assert_close(scaled.propagate(e), coupled.propagate(e))
    torch.testing.assert_close(scaled.invariant(), coupled.invariant())


@pytest.mark.parametrize("kind", MODULES)
def test_errors_propagate_in_batches_as_one_by_one(kind: str) -> None:
    cell = build_cells(make(kind, 2), BoxInput.bounded(1.0, D))
    e = torch.rand(7, cell.state_size, dtype=torch.float64)
    torch.testing.assert_close(cell.propagate(e), torch.stack([cell.propagate(row) for row in e]))


@pytest.mark.parametrize("kind", ["tanh", "lstm", "coupled", "gru"])
def test_propagators_are_monotone_and_homogeneous(kind: str) -> None:
    cell = build_cells(make(kind, 2), BoxInput.bounded(1.0, D))
    small = torch.rand(50, cell.state_size, dtype=torch.float64)
    large = small + torch.rand(50, cell.state_size, dtype=torch.float64)
    assert bool((cell.propagate(small) <= cell.propagate(large) + 1e-12).all())
    torch.testing.assert_close(cell.propagate(3 * small), 3 * cell.propagate(small))


def test_the_range_over_points_is_exact() -> None:
    torch.manual_seed(0)
    points, weight, bias = torch.randn(9001, D).double(), torch.randn(8, D).double(), torch.randn(8).double()
    drive = PointInput(points).project(weight, bias)
    values = points @ weight.T + bias
    torch.testing.assert_close(drive.low, values.amin(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(drive.high, values.amax(0), rtol=1e-9, atol=1e-9)
    assert drive.contains(values)


def test_without_input_weights_nothing_is_unbounded() -> None:
    bias = torch.tensor([0.5, -1.0]).double()
    drive = AnyInput().project(torch.tensor([[0.0], [1.0]]).double(), bias)
    assert drive.low.tolist() == [0.5, -math.inf]
    assert drive.high.tolist() == [0.5, math.inf]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(2, 3), "no recurrent layer"),
        (nn.LSTM(2, 3, bidirectional=True), "bidirectional"),
        (nn.LSTM(2, 3, proj_size=2), "proj_size=2"),
        (nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 3, bidirectional=True)), "GRU '1' is bidirectional"),
    ],
)
def test_modules_that_cannot_be_handled_get_one_sentence(module: nn.Module, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        find_recurrent(module)
    assert "\n" not in str(caught.value)


class Leaky(nn.RNN):
    """A layer of one's own around torch's weights, which say nothing of its memory."""

    def forward(self, x: torch.Tensor, hx: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, last = super().forward(x, hx)
        return hidden, last if hx is None else 0.999 * hx + 0.001 * last


class Tripled(nn.RNN):
    """A layer that runs with other weights than it has."""

    @property
    def _flat_weights(self) -> list[torch.Tensor]:
        return [3 * weight for weight in self._parameters.values() if weight is not None]

    @_flat_weights.setter
    def _flat_weights(self, weights: object) -> None:
        """Let `nn.RNN` set them."""


class Frozen(nn.RNN):
    """A layer that stays in evaluation mode: what it computes is torch's."""

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_that_do_not_do_what_their_weights_say_are_refused() -> None:
    normed = nn.utils.weight_norm(nn.RNN(2, 3), "weight_hh_l0")
    for module, words in ((Leaky(2, 3), "methods"), (Tripled(2, 3), "methods"), (normed, "weight_norm")):
        with pytest.raises(InputError, match=words):
            find_recurrent(module)
    parametrized = nn.RNN(2, 3)
    nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
    for module in (Frozen(2, 3), parametrized):
        assert find_recurrent(module) == [("", module)]


def test_weights_that_are_not_finite_are_named() -> None:
    module = nn.LSTM(2, 3)
    with torch.no_grad():
        module.bias_hh_l0[4] = math.nan
    with pytest.raises(InputError, match="bias_hh_l0"):
        find_recurrent(module)


def test_recurrent_layers_are_found_by_name() -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(2, 3, 2), "head": nn.Linear(3, 1), "cell": nn.GRUCell(3, 3)})
    assert [name for name, _ in find_recurrent(model)] == ["encoder", "cell"]


def test_states_of_the_wrong_form_are_refused() -> None:
    lstm = StateLayout.of(nn.LSTM(D, H, 2))
    with pytest.raises(InputError, match="pair of tensors"):
        lstm.flatten(torch.zeros(2, B, H))
    with pytest.raises(InputError, match="2 layer"):
        lstm.flatten((torch.zeros(1, B, H), torch.zeros(1, B, H)))
    with pytest.raises(InputError, match="one tensor h"):
        StateLayout.of(nn.GRU(D, H)).flatten((torch.zeros(1, B, H), torch.zeros(1, B, H)))


def test_weights_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(InputError, match="needs weights of 20 rows"):
        LSTMCell(torch.zeros(20, D), torch.zeros(15, H))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("repeats", [1, 3])
def test_distinct_rows_are_all_there_once(dtype, repeats):
    rows = torch.randn(CHUNK // 2 + 3, 5, dtype=torch.float64).to(dtype)
    mixed = rows.repeat(repeats, 1)[torch.randperm(repeats * len(rows))]
    found = distinct(mixed)
    assert len(found) == len(rows)
    assert torch.equal(found.unique(dim=0), rows.unique(dim=0))


def test_rows_with_one_sum_are_not_taken_for_the_same(monkeypatch):
    monkeypatch.setattr(cells, "_sums_of_bits", lambda bits: torch.zeros(len(bits), dtype=torch.int64))
    rows = torch.randn(7, 2)
    assert torch.equal(distinct(rows), rows)
    assert len(distinct(rows[:1].repeat(7, 1))) == 1


@pytest.mark.parametrize("bad", [2.0, math.nan, math.inf])
def test_one_row_that_is_not_allowed_is_found_among_repeats(bad):
    cell = RNNCell(torch.ones(2, 2), torch.zeros(2, 2), inputs=BoxInput.bounded(1.0, 2))
    x = torch.tensor([[0.5, -0.5], [1.0, 1.0]]).repeat(CHUNK, 1)
    assert cell.allows(x)
    x[CHUNK + 5, 0] = bad
    assert not cell.allows(x)


def test_rows_may_be_a_negated_view_or_the_default_device_another():
    rows = torch._neg_view(torch.tensor([[1.0, -2.0], [1.0, -2.0], [1.0, -2.0]]))
    with torch.device("meta"):
        assert torch.equal(distinct(rows), torch.tensor([[-1.0, 2.0]], device="cpu"))
