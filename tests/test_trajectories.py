"""Forgetting, rates, exponents and gradients on systems whose answers are known, and what is captured by hooks."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from unrecurrent.bands import Decay, band_of_means, spread_lags
from unrecurrent.cells import AnyInput, Cell, build_cells
from unrecurrent.errors import InputError
from unrecurrent.lyapunov import _norm_by_iteration, exponents, follow, jacobians, local_rates, tangent_step
from unrecurrent.memory import measure_memory
from unrecurrent.models import Cache, Interface, SequenceModel, build_model
from unrecurrent.reading import PIECE, WHOLE, Reader
from unrecurrent.stability import StableLSTM
from unrecurrent.trajectories import CellLayer, Recurrence, Segment, Wanted, find_taps, make_lanes, shortened


def squared(outputs, targets):
    return (outputs - targets).square().sum(-1)


class MapCell(Cell):
    """s' = function(x, s), a system that is only measured."""

    def __init__(self, size, function):
        self.hidden_size, self.function = size, function

    def step(self, x, state):
        return self.function(x, state)

    def invariant(self):
        return torch.full((self.hidden_size,), math.inf, dtype=torch.float64)

    def propagate(self, e, input_error=None):
        return torch.full_like(e, math.inf)


def spectrum(cell, steps, count, starts):
    """The exponents over trajectories without inputs, one from each of `starts` (lanes, state_size)."""
    segments = [Segment(torch.zeros(steps, 1), start) for start in torch.as_tensor(starts, dtype=torch.float64)]
    lanes = make_lanes(segments, len(segments), steps)
    return exponents(follow(Recurrence(cell), lanes, count, snapshots=4))


class Readout(nn.Module):
    """A recurrent layer and the first of its hidden units."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][..., :1].to(x.dtype)


def delay_line(length):
    """A ReLU layer whose last unit repeats a positive input `length` steps later (the first unit reads it)."""
    rnn = nn.RNN(1, length, nonlinearity="relu", bias=False, batch_first=True)
    with torch.no_grad():
        rnn.weight_ih_l0.zero_()[0] = 1
        rnn.weight_hh_l0.copy_(torch.diag(torch.ones(length - 1), -1))
    return rnn


@pytest.mark.parametrize("length", [1, 5, 12])
def test_delay_line_forgets_everything_at_once_after_its_length(length):
    x = 0.5 + torch.rand(700, 1)
    model = delay_line(length)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = model

        def forward(self, inputs):
            return self.line(inputs)[0][..., -1:]

    y = Last()(x[None])[0].detach() + 0.1
    profile = measure_memory(Last(), [(x, y)], squared, positions=200, longest=64, steps=200)
    assert profile.k(0.01) == length
    (layer,) = profile.layers
    distances = dict(zip(layer.forgetting.lags, layer.forgetting.worst, strict=True))
    assert distances[length] == 0
    assert length == 1 or distances[length - 1] > 0.1
    assert layer.forgetting.settled(0.0) == length
    assert all(mean == -math.inf for mean, _, _ in layer.lyapunov)
    gradient = profile.gradient_decay
    by_lag = dict(zip(gradient.lags, gradient.worst, strict=True))
    assert by_lag[length - 1] > 0.1
    assert all(size == 0 for lag, size in by_lag.items() if lag != length - 1)
    assert layer.to_dict()["lyapunov"][0][0] is None


@pytest.mark.parametrize("rate", [0.3, 0.97])
def test_leaky_integrator_has_its_rate_everywhere(rate):
    """h' = a h + x: exponent log a, local rate a, distances and gradients a^j, to 1e-9 in float64."""
    cell = MapCell(1, lambda x, s: rate * s + x)
    model = Readout(CellLayer(cell))
    x = torch.randn(896, 1)
    y = torch.zeros(896, 1)
    profile = measure_memory(model, [(x, y)], squared, positions=50, longest=64, steps=300)
    (layer,) = profile.layers
    ((mean, low, high),) = layer.lyapunov
    assert mean == pytest.approx(math.log(rate), abs=1e-12)
    assert low <= mean + 1e-12
    assert mean <= high + 1e-12
    for values in layer.rates.values():
        np.testing.assert_allclose(values, rate, rtol=1e-12)
    decay = layer.forgetting
    np.testing.assert_allclose(decay.values[9] / decay.values[0], rate**9, rtol=1e-9)
    gradient = profile.gradient_decay
    np.testing.assert_allclose(gradient.values[20] / gradient.values[0], rate**20, rtol=1e-4)


def test_linear_network_has_the_moduli_of_its_eigenvalues():
    generator = np.random.default_rng(3)
    W = generator.normal(size=(7, 7)) / np.sqrt(7)
    matrix = torch.from_numpy(W)
    expected = np.sort(np.log(np.abs(scipy.linalg.eigvals(W))))[::-1]
    found = spectrum(MapCell(7, lambda x, s: s @ matrix.T), 2500, 7, np.ones((1, 7)))
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-3)
    assert (found[:, 1] <= found[:, 0]).all()
    assert (found[:, 0] <= found[:, 2]).all()


def test_henon_map_has_its_published_exponents():
    """λ₁ = 0.4192 (Sprott, Chaos and Time-Series Analysis, 2003); λ₁ + λ₂ = log 0.3, as |det J| = b."""

    def henon(x, s):
        return torch.stack([1 - 1.4 * s[..., 0] ** 2 + s[..., 1], 0.3 * s[..., 0]], -1)

    starts = np.stack([np.linspace(-0.1, 0.1, 24), np.full(24, 0.1)], 1)
    found = spectrum(MapCell(2, henon), 800, 2, starts)
    assert found[0, 0] == pytest.approx(0.4192, abs=0.01)
    assert found[0, 1] < 0.4192 < found[0, 2]
    assert found[:, 0].sum() == pytest.approx(math.log(0.3), abs=1e-9)


class HenonModel(SequenceModel):
    """The Hénon map driven by nothing, as a user's own recurrent model with a cache."""

    recurrent = True

    def __init__(self):
        super().__init__(Interface(None, 1, 1), 1, 2, 0.0, 0.0)

    def init_cache(self, batch: int) -> Cache:
        return (torch.zeros(1, batch, 2, dtype=self.readout.weight.dtype),)

    def advance_body(self, encoded, cache):
        states = []
        s = cache[0][0]
        for _ in range(encoded.shape[1]):
            s = torch.stack([1 - 1.4 * s[..., 0] ** 2 + s[..., 1], 0.3 * s[..., 0]], -1)
            states.append(s)
        return torch.stack(states, 1), (s[None],)


def test_model_with_a_cache_is_measured_as_one_recurrence():
    x = torch.zeros(1500, 1)
    profile = measure_memory(HenonModel(), [(x, x)], squared, ks=(1, 2), positions=20, longest=30, steps=1000)
    (layer,) = profile.layers
    assert layer.lyapunov[0][0] == pytest.approx(0.419, abs=0.04)
    assert layer.forgetting.settled(0.1) is None
    assert layer.certificate is None
    assert "a state of 2 numbers" in repr(profile)


def test_tangents_are_those_of_the_jacobians():
    cell = build_cells(nn.LSTM(3, 5, 2), AnyInput())
    recurrence = Recurrence(cell)
    x, state = torch.randn(4, 3), torch.randn(4, cell.state_size, dtype=torch.float64)
    directions = torch.randn(6, 4, cell.state_size, dtype=torch.float64)
    moved, images = tangent_step(recurrence, x, state, directions)
    plain = torch.einsum("nij,knj->kni", jacobians(recurrence, x.double(), state), directions)
    torch.testing.assert_close(images, plain)
    torch.testing.assert_close(moved, cell.step(x.double(), state))


@pytest.mark.parametrize("layer", [nn.RNN(3, 40), nn.GRU(3, 40), nn.LSTM(3, 40), StableLSTM(3, 40)])
def test_norm_by_iteration_comes_near_the_exact_one(layer):
    recurrence = Recurrence(build_cells(layer, AnyInput()))
    inputs = torch.randn(7, 5, 3)
    states = 0.3 * torch.randn(5, recurrence.state_size, dtype=torch.float64)
    product = torch.eye(recurrence.state_size, dtype=torch.float64).expand(5, -1, -1)
    running = states
    for x in inputs:
        product = jacobians(recurrence, x.double(), running) @ product
        running = recurrence.step(x, running)
    exact = torch.linalg.svdvals(product)[:, 0]
    with torch.no_grad():
        found = _norm_by_iteration(recurrence, inputs, states)
    assert (found <= exact * (1 + 1e-9)).all()
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)
    rates = local_rates(recurrence, inputs, states)
    np.testing.assert_allclose(rates, exact.numpy() ** (1 / 7), rtol=0.005)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM, StableLSTM])
def test_captured_trajectories_are_the_layer_s_own(kind):
    """Stepping through a captured segment in float64 ends in what the layer itself gives, in pieces or at once."""
    layer = kind(3, 5, 2, batch_first=True).eval()
    x = torch.randn(3 * PIECE + 63, 3)
    with torch.no_grad():
        whole = layer(x[None])[0][0]
    model = Readout(layer)
    taps, notes = find_taps(model)
    assert notes == []
    (tap,) = taps
    reader = Reader(model, x.device)
    wanted = {0: [Wanted(0, 0, len(x))]}
    with torch.no_grad(), tap.listening():
        for piece in reader.read([x]):
            tap.take([0], piece, wanted, carried=False)
    tap.finish()
    recurrence = tap.recurrence()
    (segment,) = tap.segments
    short = shortened(recurrence, [segment], 100)
    assert sum(len(s.inputs) for s in short) == len(x)
    state = short[7].start[None]
    for x_t in short[7].inputs:
        state = recurrence.step(x_t[None], state)
    torch.testing.assert_close(recurrence.hidden(state)[0].float(), whole[799], atol=1e-5, rtol=1e-4)


def test_long_sequences_are_read_in_pieces_with_the_state_carried():
    """A plain module longer than WHOLE is read in pieces when a trial shows that handing states on is exact."""
    model = Readout(nn.LSTM(2, 4, batch_first=True)).eval()
    x = torch.randn(WHOLE + 700, 2)
    reader = Reader(model, x.device)
    reader.try_on(x)
    assert reader.carries(len(x))
    assert not reader.carries(WHOLE)
    with torch.no_grad():
        pieces = list(reader.read([x]))
        whole = model(x[None])
    assert max(piece.outputs.shape[1] for piece in pieces) == PIECE
    torch.testing.assert_close(torch.cat([p.outputs for p in pieces], 1), whole, atol=1e-5, rtol=1e-4)


class SlowAverage(nn.Module):
    """An LSTM over a convolution: its state alone does not carry what it has seen."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)
        self.conv = nn.Conv1d(1, 1, 9)

    def forward(self, x):
        padded = nn.functional.pad(x.transpose(1, 2), (8, 0))
        return self.lstm(self.conv(padded).transpose(1, 2))[0]


def test_what_cannot_be_carried_is_read_in_overlapping_blocks():
    model = SlowAverage().eval()
    x = torch.randn(2 * WHOLE + 11, 1)
    reader = Reader(model, x.device)
    reader.try_on(x)
    assert not reader.carries(len(x))
    assert reader.context(len(x)) == WHOLE // 2
    with torch.no_grad():
        pieces = list(reader.read([x]))
        joined = torch.cat([p.outputs[:, p.new - p.first :] for p in pieces], 1)
        torch.testing.assert_close(joined, model(x[None]), atol=1e-5, rtol=1e-4)
    profile = measure_memory(model, [(x, torch.zeros(len(x), 3))], squared, ks=(1,), positions=40, steps=64)
    assert profile.context == WHOLE // 2
    assert f"at least {WHOLE // 2:,} inputs" in repr(profile)


class StepByStep(nn.Module):
    """A model that drives a cell of torch itself."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(2, 3)

    def forward(self, x):
        h, outputs = torch.zeros(len(x), 3), []
        for x_t in x.unbind(1):
            h = self.cell(x_t, h)
            outputs.append(h)
        return torch.stack(outputs, 1)


def test_cells_called_step_by_step_are_measured():
    data = [(torch.randn(n, 2), torch.zeros(n, 3)) for n in (30, 30, 41)]
    profile = measure_memory(StepByStep(), data, squared, positions=60, steps=60)
    (layer,) = profile.layers
    assert layer.name == "cell"
    assert len(layer.lyapunov) == 3
    assert layer.certificate is not None
    assert layer.forgetting.lags[-1] == 41


class LayerStepByStep(nn.Module):
    """A model that calls a whole layer for every step, with the state it returned or without."""

    def __init__(self, handed_on):
        super().__init__()
        self.layer, self.handed_on = nn.LSTM(2, 3, batch_first=True), handed_on

    def forward(self, x):
        state, outputs = None, []
        for x_t in x.split(1, 1):
            y, state = self.layer(x_t, state)
            state = state if self.handed_on else tuple(part / 2 for part in state)
            outputs.append(y)
        return torch.cat(outputs, 1)


def test_layers_called_step_by_step_are_measured_as_in_one_call():
    class Whole(LayerStepByStep):
        def forward(self, x):
            return self.layer(x)[0]

    models = [LayerStepByStep(True), Whole(True), LayerStepByStep(False)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    data = [(torch.randn(n, 2), torch.zeros(n, 3)) for n in (30, 30, 41)]
    stepwise, whole, changed = (measure_memory(m, data, squared, positions=60, steps=60) for m in models)
    np.testing.assert_allclose(stepwise.forgetting.values, whole.forgetting.values, atol=1e-5)
    np.testing.assert_allclose(stepwise.lyapunov, whole.lyapunov, atol=1e-3)
    assert changed.layers == ()
    assert "'layer' is called for every step with other states" in changed.notes[0]


def test_a_layer_that_reads_two_sequences_step_by_step_is_measured_on_the_first():
    class Both(LayerStepByStep):
        def forward(self, x):
            return super().forward(x) + super().forward(x.flip(1).cumsum(1)).mean(1, keepdim=True) * 0

    once, twice = LayerStepByStep(True), Both(True)
    twice.load_state_dict(once.state_dict())
    data = [(torch.randn(30, 2), torch.zeros(30, 3))]
    first, both = (measure_memory(model, data, squared, positions=20, steps=30) for model in (once, twice))
    np.testing.assert_allclose(both.forgetting.values, first.forgetting.values, atol=1e-6)


def test_a_layer_seen_in_no_state_but_its_start_is_not_said_to_forget():
    profile = measure_memory(
        Readout(nn.LSTM(2, 3, batch_first=True)), [(torch.randn(1, 2), torch.zeros(1, 1))], squared
    )
    assert profile.forgetting is None
    assert "no state but its start" in profile.notes[0]


@pytest.mark.parametrize("name", ["rnn", "lstm", "gru", "stable-lstm", "certified-lstm"])
def test_profile_of_every_recurrent_model(name):
    model = build_model(name, Interface(6, None, 6), {"hidden_size": 5, "embedding_size": 4})
    x = torch.randint(0, 6, (640,))

    def loss(outputs, targets):
        return nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")

    profile = measure_memory(model, [(x[:-1], x[1:])], loss, positions=40, longest=40, exponents="all", steps=100)
    assert model.training
    (layer,) = profile.layers
    assert len(layer.lyapunov) == (5 if name in ("rnn", "gru") else 10)
    assert profile.lyapunov == sorted(profile.lyapunov, reverse=True)
    assert set(layer.rates) == {1, 16}
    horizon = layer.certificate.horizon(1e-2)
    settled = layer.forgetting.settled(2e-2)
    assert horizon is None or settled is None or settled <= horizon
    described = profile.to_dict()
    assert described["layers"][0]["label"] == "estimate"
    assert described["gradient_decay"]["samples"] == 32
    assert "verdict" in described
    assert "Lyapunov exponents" in repr(profile)


@pytest.mark.parametrize(
    "layer", [nn.LSTM(2, 3, bidirectional=True, batch_first=True), nn.MultiheadAttention(2, 1, batch_first=True)]
)
def test_models_that_see_the_future_are_detected(layer):
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x)[0] if isinstance(layer, nn.MultiheadAttention) else layer(x)[0]

    data = [(torch.randn(50, 2), torch.randn(50, 1))]
    with pytest.raises(InputError, match="not causal"):
        measure_memory(Seeing(), data, lambda o, t: o.sum(-1))


def test_symbols_that_see_the_future_are_detected():
    class Next(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.roll(x, -1, 1), 3).float()

    with pytest.raises(InputError, match="not causal"):
        measure_memory(Next(), [(torch.arange(40) % 3, torch.arange(40) % 3)], lambda o, t: o.sum(-1))


class Offset(nn.Module):
    """A small network whose outputs stand at a level far above what they vary by."""

    def __init__(self, level, body, width):
        super().__init__()
        self.level, self.body, self.readout = level, body, nn.Linear(width, 1)

    def forward(self, x):
        states = self.body(x)
        return self.level + self.readout(states[0] if isinstance(states, tuple) else states)


@pytest.mark.parametrize("level", [0, 100, 293, 1000])
def test_seeing_the_future_is_detected_at_any_level_of_the_outputs(level):
    x = torch.randn(300, 1)
    seeing = Offset(level, nn.LSTM(1, 8, bidirectional=True, batch_first=True), 16)
    with pytest.raises(InputError, match="not causal"):
        measure_memory(seeing, [(x, x)], squared)
    causal = Offset(level, nn.LSTM(1, 8, batch_first=True), 8)
    measure_memory(causal, [(x, x)], squared, ks=(1,), layers=False)


@pytest.mark.parametrize("level", [0, 1000])
def test_whether_states_can_be_carried_is_told_at_any_level_of_the_outputs(level):
    x = torch.randn(100, 1)
    for body, carried in ((nn.LSTM(1, 3, batch_first=True), True), (SlowAverage(), False)):
        reader = Reader(Offset(level, body, 3), x.device)
        reader.try_on(x)
        assert reader.carries(WHOLE + 1) == carried


class Ahead(nn.Module):
    """Each output is the input some steps later."""

    def __init__(self, lag):
        super().__init__()
        self.lag = lag

    def forward(self, x):
        return torch.roll(x, -self.lag, 1)[..., None].float()


def test_looking_far_ahead_is_detected():
    x = torch.randn(1100)
    with pytest.raises(InputError, match="not causal"):
        measure_memory(Ahead(400), [(x, x)], lambda o, t: o.sum(-1))


def test_looking_ahead_is_detected_where_symbols_do_not_change_at_first():
    x = torch.cat([torch.zeros(600, dtype=torch.int64), torch.arange(600) % 5])
    with pytest.raises(InputError, match="not causal"):
        measure_memory(Ahead(1), [(x, x)], lambda o, t: o.sum(-1))
    with pytest.raises(InputError, match="not causal"):
        measure_memory(Ahead(1), [(x[:50] + 3, x[:50])], lambda o, t: o.sum(-1))


class Windowed(nn.Module):
    """A Transformer layer in which each step attends to the last `k` steps only."""

    def __init__(self, k):
        super().__init__()
        self.k = k
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        i = torch.arange(x.shape[1])
        hidden = (i[None] > i[:, None]) | (i[None] <= i[:, None] - self.k)
        return self.layer(x, src_mask=hidden)


@pytest.mark.parametrize("k", [1, 6])
def test_transformer_with_a_window_mask_needs_its_window(k):
    model = Windowed(k).eval()
    x = torch.randn(90, 4)
    with torch.no_grad():
        y = model(x[None])[0]
    profile = measure_memory(model, [(x, y + 1e-3)], squared, positions=90)
    assert profile.k(0.01) == k
    assert profile.layers == ()
    assert profile.forgetting is None
    beyond = [
        size for lag, size in zip(profile.gradient_decay.lags, profile.gradient_decay.worst, strict=True) if lag >= k
    ]
    assert max(beyond) == 0


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4)])
def test_convolution_needs_its_receptive_field(dilations):
    class Convolutions(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv1d(2, 2, 3, dilation=d) for d in dilations)

        def forward(self, x):
            y = x.transpose(1, 2)
            for layer, d in zip(self.layers, dilations, strict=True):
                y = layer(nn.functional.pad(y, (2 * d, 0)))
            return y.transpose(1, 2)

    model, x = Convolutions(), torch.randn(300, 2)
    with torch.no_grad():
        y = model(x[None])[0]
    profile = measure_memory(model, [(x, y + 1e-4)], squared, positions=200)
    assert profile.k(0.01) == 1 + 2 * sum(dilations)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_layers_that_cannot_be_measured_are_named():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(1, 4, proj_size=2, batch_first=True)

        def forward(self, x):
            return self.lstm(x)[0]

    profile = measure_memory(Projected(), [(torch.randn(40, 1), torch.randn(40, 2))], squared, positions=20)
    assert profile.layers == ()
    assert "proj_size" in profile.notes[0]


def test_layers_with_a_batch_of_their_own_are_named():
    class Folding(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(2, 3)
            self.unused = nn.GRU(2, 3)

        def forward(self, x):
            return self.cell(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    profile = measure_memory(Folding(), [(torch.randn(40, 2), torch.randn(40, 3))], squared, positions=20)
    assert profile.layers == ()
    assert "'cell' reads a batch of 40" in profile.notes[0]
    assert "'unused' is never called" in profile.notes[1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([(torch.tensor([[1.0], [math.nan]]), torch.zeros(2, 1))], "NaN or infinite"),
        ([(torch.zeros(3, 1), torch.zeros(4, 1))], "3 inputs but 4 targets"),
        ([(torch.zeros(0, 1), torch.zeros(0, 1))], "nothing to measure"),
        ([(torch.zeros(3, 1), torch.full((3, 1), math.nan))], "the loss is NaN"),
    ],
)
def test_unusable_data_is_one_sentence(data, said):
    with pytest.raises(InputError, match=said) as raised:
        measure_memory(Readout(nn.RNN(1, 2, batch_first=True)), data, squared)
    assert len(str(raised.value).splitlines()) == 1


def test_outputs_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"\(B, T, outputs\)"):
        measure_memory(nn.RNN(1, 2, batch_first=True), [(torch.randn(9, 1), torch.randn(9, 1))], squared)


def test_lags_and_bands():
    assert spread_lags(3) == (1, 2, 3)
    assert spread_lags(1000)[-1] == 1000
    assert len(spread_lags(4096)) < 100
    decay = Decay.of((1, 2, 3), np.array([[2.0, 1.0], [0.5, np.nan], [np.nan, np.nan]]))
    assert decay.lags == (1, 2)
    assert decay.settled(1.0) == 2
    assert decay.settled(0.1) is None
    low, high = band_of_means(np.array([[1.0, 2.0, 3.0]]))
    assert 1 <= low[0] < 2 < high[0] <= 3


def test_figure_and_page_hold_the_verdict(tmp_path):
    x = torch.randn(200, 1)
    profile = measure_memory(Readout(nn.GRU(1, 4, batch_first=True)), [(x, x)], squared, positions=30, steps=60)
    figure = profile.plot()
    assert len(figure.data) >= 7
    path = tmp_path / "memory.html"
    profile.save_report(path, "A <small> model")
    page = path.read_text(encoding="utf-8")
    assert "A &lt;small&gt; model" in page
    assert "(estimate)" in page
    assert "https://cdn" not in page.split("<body>")[1]
    assert "<h2>" in profile.to_html("x")


def test_profile_is_the_same_each_time():
    torch.manual_seed(1)
    model, x = Readout(nn.LSTM(1, 3, batch_first=True)), torch.randn(300, 1)
    first, second = (measure_memory(model, [(x, x)], squared, positions=20, steps=50).to_dict() for _ in range(2))
    assert first == second
