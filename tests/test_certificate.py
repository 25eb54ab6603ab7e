"""certify(): never looser than the plain propagator, sound end to end, and clear about what it needs."""

import copy
import doctest
import json
import math
import pickle
import time
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from plain_propagator import PlainLayer, PlainStack, plain_stack
from test_cells import tie_input_gate
from unrecurrent.cells import (
    BoxInput,
    Cell,
    GRUCell,
    RNNCell,
    ScaledGateLSTMCell,
    StackedCell,
    find_recurrent,
)
from unrecurrent.certificate import Certificate, certify, contraction_rate
from unrecurrent.errors import InputError
from unrecurrent.stability import StableLSTM

D = 3


def scaled_rows(module: nn.Module, row_sum: float) -> nn.Module:
    """Scale each recurrent matrix so that its largest absolute row sum is `row_sum`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(row_sum / parameter.abs().sum(1).max())
    return module


def driven(weight: Tensor) -> RNNCell:
    """A tanh layer that any input may drive anywhere: slopes up to 1, states up to 1."""
    return RNNCell(torch.ones(len(weight), 1), weight)


FACTORIES = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "coupled": lambda *sizes: tie_input_gate(nn.LSTM(*sizes)),
    "gru": nn.GRU,
}


def random_module(kind: str, layers: int, row_sum: float, pattern: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    module = FACTORIES[kind](D, 1 + seed % 7, layers)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 10 ** float(torch.empty(1).uniform_(-1, 0.3)))
            if "weight_hh" in name and pattern != "dense":
                for block in parameter.split(module.hidden_size):
                    block.copy_(torch.diag(block.diag()) if pattern == "diagonal" else block.tril())
    scaled_rows(module, row_sum)
    return tie_input_gate(module) if kind == "coupled" else module


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("row_sum", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("kind", FACTORIES)
def test_never_looser_than_the_plain_propagator(kind: str, row_sum: float, layers: int) -> None:
    for seed, pattern in enumerate(("dense", "diagonal", "triangular", "dense")):
        module = random_module(kind, layers, row_sum, pattern, seed)
        plain = plain_stack(module, input_bound=1.0)
        rate, _ = plain.rate()
        certificate = certify(module, input_bound=1.0, method="componentwise")
        assert certificate.rate <= 1.01 * rate
        if rate < 0.97:
            for eps in (0.1, 1e-3):
                assert certificate.horizon(eps) <= plain.horizon(eps)


def test_scaled_gates_are_never_looser_either() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        size = 2 + seed
        weights = [torch.randn(3 * size, D), 0.2 * torch.randn(3 * size, size), *torch.randn(2, 3 * size)]
        ceiling, reach = 0.9 * torch.rand(size), weights[0].abs().sum(1)
        bias = weights[2] + weights[3]
        drive = ((bias - reach).double(), (bias + reach).double())
        plain = PlainStack([PlainLayer("scaled", weights[:2], drive, ceiling.double())])
        cell = ScaledGateLSTMCell(*weights, forget_ceiling=ceiling, inputs=BoxInput.bounded(1.0, D))
        assert certify(cell).rate <= 1.01 * plain.rate()[0]


@pytest.mark.parametrize("kind", FACTORIES)
def test_horizons_hold_on_trajectories(kind: str) -> None:
    """From any state within the bounds, k(ε) inputs later the output is within ε of that from the zero state."""
    module = random_module(kind, 2, 0.02, "dense", seed=4).double()
    certificate = certify(module, input_bound=1.0)
    assert certificate.stable
    cell, box = certificate.cell, certificate.cell.invariant_box()
    state = box.low + torch.rand(500, cell.state_size, dtype=torch.float64).round() * (box.high - box.low)
    zero = torch.zeros_like(state)
    horizons = {eps: certificate.horizon(eps) for eps in (0.5, 0.1)}
    bound = certificate.invariant
    for k in range(1, max(horizons.values()) + 5):
        x = torch.empty(500, D, dtype=torch.float64).uniform_(-1, 1).sign()
        state, zero = cell.step(x, state), cell.step(x, zero)
        bound = certificate.propagate(bound)
        change = cell.hidden(state - zero).abs()
        assert bool((change <= certificate.hidden(bound) + 1e-12).all())
        for eps, horizon in horizons.items():
            if k >= horizon:
                assert float(change.max()) <= eps


def test_known_rates() -> None:
    diagonal = RNNCell(torch.zeros(3, 1), torch.diag(torch.tensor([0.2, -0.7, 0.5])))
    assert certify(diagonal).rate == pytest.approx(0.7, rel=1e-6)
    swapped = RNNCell(torch.zeros(2, 1), torch.tensor([[0.0, 0.9], [0.4, 0.0]]))
    assert certify(swapped, method="componentwise").rate == pytest.approx(0.6, rel=1e-6)


def test_no_recurrent_weights_mean_rate_zero() -> None:
    module = nn.RNN(D, 4, 2)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l1.zero_()
    certificate = certify(module)
    assert certificate.rate == 0
    assert certificate.horizon(1e-9) == 1


def test_the_rate_of_an_uncoupled_lstm_is_its_forget_gate_with_both_biases() -> None:
    module = nn.LSTM(D, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[1], module.bias_hh_l0[1] = 1.0, 2.0
    assert certify(module).rate == pytest.approx(1 / (1 + math.exp(-3)), rel=1e-6)


def test_rows_not_columns_decide() -> None:
    """One unit reads many: its row sum is large, all column sums are small. Taking columns would certify it."""
    size = 8
    weight = torch.zeros(size, size)
    weight[0] = weight[:, 0] = 0.5
    certificate = certify(RNNCell(torch.zeros(size, 1), weight), method="componentwise")
    assert certificate.rate == pytest.approx(float(torch.linalg.eigvalsh(weight).max()), rel=1e-5)
    module = nn.LSTM(1, size)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_hh_l0[2 * size] = 0.06  # row sum 0.48 > (1 − F)/4 = 0.125, column sums 0.06
    assert not certify(module, method="miller-hardt").stable


def test_a_norm_of_exactly_one_is_not_stable() -> None:
    """Clipping singular values at 1 leaves a map that need not contract."""
    module = nn.RNN(D, 4)
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.linalg.qr(torch.randn(4, 4))[0])
    for method in ("best", "spectral", "miller-hardt"):
        certificate = certify(module, method=method)
        assert not certificate.stable
        assert certificate.horizon(0.01) is None


def test_a_cycle_of_two_still_finds_its_rate() -> None:
    rate, v = contraction_rate(RNNCell(torch.zeros(2, 1), torch.tensor([[0.0, 1.0], [0.25, 0.0]])))
    assert rate == pytest.approx(0.5, rel=1e-6)
    assert float(v[0] / v[1]) == pytest.approx(2.0, rel=1e-4)


def test_the_horizon_waits_for_errors_that_come_back() -> None:
    """T^k(e) falls below ε and rises again: the horizon is after the last excess, not before the first dip."""
    weight = torch.tensor([[0.0, 0.0, 3.0], [0.6, 0.0, 0.0], [0.0, 0.3, 0.0]])
    cell = driven(weight)
    errors, e = [], cell.invariant()
    for _ in range(200):
        errors.append(float(e.max()))
        e = cell.propagate(e)
    for eps in (0.5, 0.1, 0.03):
        last = max(k for k, error in enumerate(errors) if error > eps)
        assert certify(cell, method="componentwise").horizon(eps) == last + 1
    assert errors[1] > errors[0]


def test_horizons_beyond_the_iterated_steps_are_extrapolated() -> None:
    cell = driven(torch.diag(torch.tensor([0.5, 1 - 1e-6], dtype=torch.float64)))
    exact = math.log(1e-3) / math.log1p(-1e-6)
    assert certify(cell, method="componentwise").horizon(1e-3) == pytest.approx(exact, rel=1e-3)


def test_the_better_of_two_proofs_is_reported() -> None:
    rotation = nn.RNN(D, 2)
    with torch.no_grad():
        rotation.weight_hh_l0.copy_(0.8 * torch.tensor([[0.6, -0.8], [0.8, 0.6]]))
    best = certify(rotation)
    assert (best.method, best.rate) == ("spectral", pytest.approx(0.8))
    assert certify(rotation, method="componentwise").rate == pytest.approx(1.12)
    skewed = nn.RNN(D, 2)
    with torch.no_grad():
        skewed.weight_hh_l0.copy_(torch.tensor([[0.5, 5.0], [0.0, 0.5]]))
    assert certify(skewed).method == "componentwise"
    assert 0.5 < certify(skewed, method="spectral").rate < 1  # weighted: the plain norm is above 5


def test_a_weighted_norm_contracts_where_neither_plain_bound_does() -> None:
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    skew = torch.tensor([1.0, 10.0])
    weight = 0.9 * skew[:, None] * rotation / skew
    assert float(torch.linalg.matrix_norm(weight, 2)) > 1
    assert certify(driven(weight), method="componentwise").rate > 1
    certificate = certify(driven(weight))
    assert certificate.rate == pytest.approx(0.9, rel=0.01)
    state, k = 2 * torch.rand(1000, 2, dtype=torch.float64).round() - 1, certificate.horizon(0.1)
    zero = torch.zeros_like(state)
    for _ in range(k):
        x = torch.randn(1000, 1, dtype=torch.float64)
        state, zero = certificate.cell.step(x, state), certificate.cell.step(x, zero)
    assert float((state - zero).abs().max()) <= 0.1
    e = torch.rand(2, dtype=torch.float64)
    assert bool((certificate.propagate(e, steps=k) < certificate.propagate(e) + 1e-12).all())


def test_the_best_horizon_need_not_come_from_the_best_rate() -> None:
    module = random_module("rnn", 2, 0.9, "dense", seed=6)
    horizons = [certify(module, method=method).horizon(0.5) for method in ("componentwise", "spectral")]
    found = certify(module).horizon(0.5)
    assert found == min(k for k in horizons if k is not None)


def test_a_stack_is_as_good_as_its_worst_layer() -> None:
    for kind in FACTORIES:
        module = random_module(kind, 3, 0.1, "dense", seed=5)
        certificate = certify(module, input_bound=1.0, method="componentwise")
        assert len(certificate.layers) == 3
        assert certificate.rate == pytest.approx(max(layer.rate for layer in certificate.layers), rel=1e-4)


def test_a_near_one_layer_does_not_spoil_the_stack() -> None:
    module = nn.RNN(2, 2, 2)
    with torch.no_grad():
        module.weight_hh_l0.copy_((1 - 1e-5) * torch.eye(2))
        module.weight_hh_l1.copy_((1 - 1e-5) * torch.eye(2))
    assert certify(module).stable


@pytest.mark.parametrize(
    ("size", "layers", "diagonal", "within"), [(6, 3, 0.0, 1e-5), (6, 20, 0.0, 0.1), (48, 3, 0.5, 0.6)]
)
def test_a_stack_of_layers_with_weights_far_apart_is_certified(size, layers, diagonal, within) -> None:
    """Of a triangular W the weights of the norm lie hundreds of decades apart, those of the stack further still."""
    module = nn.RNN(2, size, layers)
    with torch.no_grad():
        for number in range(layers):
            getattr(module, f"weight_hh_l{number}").copy_(torch.randn(size, size).triu(1) + diagonal * torch.eye(size))
    certificate = certify(module, method="componentwise")
    assert certificate.rate <= within
    v = certificate.proofs[0].weights
    moved = certificate.propagate(v)
    assert bool((v > 0).all() and moved.isfinite().all() and (moved <= certificate.rate * (1 + 1e-12) * v).all())
    assert certificate.horizon(0.01) > size


def test_the_reason_is_the_one_that_applies() -> None:
    module = nn.RNN(2, 3).double()
    with torch.no_grad():
        module.weight_hh_l0.fill_(1e308)
    (reason,) = certify(module, method="componentwise").reasons
    assert "range of float64" in reason
    assert "gate" not in reason


def test_without_input_bounds_gates_can_come_close_to_one() -> None:
    free = certify(nn.LSTM(D, 4))
    assert not free.stable
    assert free.rate is None
    assert free.horizon(0.1) is None
    assert "inputs, input_bound or embedding" in repr(free)
    scaled = certify(StableLSTM(D, 4))
    assert scaled.stable
    assert scaled.rate < 1
    assert "all inputs" in scaled.assumptions


def test_what_misses_says_by_how_much() -> None:
    certificate = certify(scaled_rows(nn.LSTM(D, 4), 4.0), input_bound=1.0)
    assert not certificate.stable
    assert certificate.rate > 1
    assert f"{certificate.rate:.6g}" in repr(certificate)


@pytest.mark.parametrize("layers", [1, 2])
def test_stable_lstms_are_certified(layers: int) -> None:
    module = StableLSTM(D, 5, layers)
    for allowed in ({}, {"input_bound": 1.0}, {"inputs": torch.randn(7, 2, D)}):
        certificate = certify(module, **allowed)
        assert certificate.stable
        assert len(certificate.layers) == (layers if layers > 1 else 0)
    x, h0 = torch.randn(9, 2, D), torch.zeros(layers, 2, 5)
    cell = certificate.cell
    state = certificate.flatten((h0, h0))
    for x_t in x.double():
        state = cell.step(x_t, state)
    outputs, last = module(x, (h0, h0))
    torch.testing.assert_close(cell.hidden(state).float(), outputs[-1], rtol=0, atol=1e-5)
    torch.testing.assert_close(certificate.flatten(last), state, rtol=0, atol=1e-5)


# What the statement is about ------------------------------------------------------------------------------------------


def test_the_three_ways_to_say_which_inputs() -> None:
    gru = scaled_rows(nn.GRU(D, 4), 0.2)
    table = torch.randn(50, D)
    by_table = certify(gru, embedding=nn.Embedding.from_pretrained(table))
    assert by_table.rate == pytest.approx(certify(gru, inputs=table).rate)
    assert by_table.rate == pytest.approx(certify(gru, embedding=table).rate)
    assert by_table.rate <= certify(gru, input_bound=float(table.abs().max())).rate
    assert "50 rows of the embedding" in by_table.assumptions[0]


def test_embeddings_that_shorten_their_rows_are_taken_shortened() -> None:
    gru = scaled_rows(nn.GRU(D, 4), 0.2)
    embedding = nn.Embedding(20, D, max_norm=0.1)
    looked_up = copy.deepcopy(embedding)(torch.arange(20)).detach()
    assert certify(gru, embedding=embedding).rate == pytest.approx(certify(gru, inputs=looked_up).rate)


def test_data_may_come_in_any_layout() -> None:
    gru = scaled_rows(nn.GRU(D, 4, batch_first=True), 0.2)
    x = torch.randn(6, 9, D)
    rates = [certify(gru, inputs=data).rate for data in (x, x.reshape(-1, D), pack_sequence(list(x)))]
    assert rates == pytest.approx([rates[0]] * 3)


def test_a_sequence_fed_as_a_batch_shows_in_the_assumptions() -> None:
    """(1, T, D) without batch_first is T sequences of one step, in which nothing recurs: it must be seen."""
    x = torch.randn(1, 40, D)
    assert "40 sequence(s) of 1 step(s)" in certify(nn.GRU(D, 4), inputs=x).assumptions[0]
    assert "1 sequence(s) of 40 step(s)" in certify(nn.GRU(D, 4, batch_first=True), inputs=x).assumptions[0]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, D)
        self.drop = nn.Dropout(0.5)
        self.gru = scaled_rows(nn.GRU(D, 4, batch_first=True), 0.2)
        self.head = nn.Linear(4, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.drop(self.embed(tokens)))[0])


def test_inputs_of_a_model_are_followed_to_its_layer() -> None:
    model = Tagger()
    tokens = torch.arange(20).reshape(2, 10)
    certificate = certify(model, inputs=tokens, readout=model.head)
    assert certificate.name == "gru"
    assert certificate.rate == pytest.approx(certify(model.gru, embedding=model.embed).rate)
    assert not model.gru._forward_pre_hooks


def test_certificates_are_about_evaluation_mode() -> None:
    """Dropout scales what it keeps by 1/(1 − p): bounds seen without it do not cover inputs that went through it."""
    model = Tagger().train()
    tokens = torch.arange(20).reshape(2, 10)
    certificate = certify(model, inputs=tokens)
    assert model.training
    assert model.drop.training
    x = model.embed(tokens)
    assert certificate.holds_for(x, batch_first=True)
    assert not certificate.holds_for(model.drop(x), batch_first=True)
    stacked = certify(nn.GRU(D, 4, 2, dropout=0.3), input_bound=1.0)
    assert any("without dropout" in sentence for sentence in stacked.assumptions)


def test_start_states_given_to_the_layer_are_covered() -> None:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(D, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x, torch.full((1, x.shape[1], 4), 7.0))[0]

    certificate = certify(Started(), inputs=torch.randn(5, 2, D))
    assert float(certificate.invariant.min()) == 7.0


def test_h0_outside_the_bounds_widens_them() -> None:
    lstm = scaled_rows(nn.LSTM(D, 4), 0.1)
    h0 = (torch.full((1, 2, 4), 1.5), torch.full((1, 2, 4), -9.0))
    x = torch.rand(6, 2, D)
    plain = certify(lstm, input_bound=1.0)
    widened = certify(lstm, input_bound=1.0, h0=h0)
    assert not plain.holds_for(x, h0)
    assert widened.holds_for(x, h0)
    assert widened.invariant.tolist() == [9.0] * 4 + [1.5] * 4
    assert widened.horizon(0.01) > plain.horizon(0.01)
    assert any("widened" in sentence for sentence in widened.assumptions)


def test_holds_for_looks_at_every_input_and_state() -> None:
    gru = nn.GRU(D, 4)
    certificate = certify(gru, input_bound=1.0)
    x = torch.rand(6, 2, D)
    assert certificate.holds_for(x)
    assert certificate.holds_for(x, torch.zeros(1, 2, 4))
    assert not certificate.holds_for(x, torch.full((1, 2, 4), 3.0))
    assert not certificate.holds_for(100 * x)
    x[3, 1, 2] = math.nan
    assert not certificate.holds_for(x)


def test_holds_for_the_very_data_it_was_made_from() -> None:
    x = torch.randn(60, 5, D)
    for module in (nn.RNN(D, 4), nn.LSTM(D, 4, 2), nn.GRU(D, 4), StableLSTM(D, 4)):
        assert certify(module, inputs=x).holds_for(x)
        assert certify(module, inputs=x).holds_for(x[10:20, 2:3])


# Readouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_softmax", [False, True])
def test_readout_bounds_hold_and_are_used(log_softmax: bool) -> None:
    module = scaled_rows(nn.GRU(D, 6), 0.3)
    linear = nn.Linear(6, 9)
    with torch.no_grad():
        linear.weight.mul_(20)
    head = nn.Sequential(linear, nn.LogSoftmax(-1)) if log_softmax else linear
    certificate = certify(module, input_bound=1.0, readout=head)
    assert certificate.horizon(0.1) > certify(module, input_bound=1.0).horizon(0.1)
    e = torch.rand(6, dtype=torch.float64)
    bound = float(certificate.readout.change(certificate.proofs[0].propagator, e.unsqueeze(0)))
    h = torch.randn(4000, 6)
    moved = h + e.float() * torch.randn(4000, 6).sign()
    change = float((head(moved) - head(h)).detach().abs().max())
    assert 0.4 * bound < change <= bound * (1 + 1e-5)


def test_readouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="reads 5 units"):
        certify(nn.GRU(D, 4), readout=nn.Linear(5, 2))
    with pytest.raises(InputError, match=r"nn\.Linear"):
        certify(nn.GRU(D, 4), readout=nn.ReLU())


# The conditions of Miller and Hardt -----------------------------------------------------------------------------------


def test_the_conditions_of_miller_and_hardt() -> None:
    """Their published constants: ‖x‖ ≤ 0.75, ‖U_f‖ ≤ 0.25, b_f ≤ 0.25, ‖W_f‖ ≤ 0.128, hence F < 0.64."""
    size = 4
    lstm = nn.LSTM(size, size)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        for gate, row_sum in enumerate((0.359, 0.128, 0.0899, 0.359)):
            lstm.weight_hh_l0[gate * size : (gate + 1) * size] = row_sum / size
        lstm.weight_ih_l0[size : 2 * size] = 0.25 / size
        lstm.weight_ih_l0[2 * size : 3 * size] = 1.0
        lstm.bias_ih_l0[size : 2 * size] = 0.125
        lstm.bias_hh_l0[size : 2 * size] = 0.125
    certificate = certify(lstm, input_bound=0.75, method="miller-hardt")
    forget = 1 / (1 + math.exp(-(0.128 + 0.75 * 0.25 + 0.25)))
    rate = forget + 2 * 0.359 / 4 + 0.0899 + 0.128 / (4 * (1 - forget))
    assert forget < 0.64
    assert certificate.stable
    assert certificate.rate == pytest.approx(rate, rel=1e-6)
    assert certificate.horizon(0.01) > certify(lstm, input_bound=0.75).horizon(0.01)
    assert not certify(lstm, input_bound=3.0, method="miller-hardt").stable
    with torch.no_grad():
        lstm.bias_hh_l0[size : 2 * size] = 0.5  # left free, the second bias breaks the conditions
    broken = certify(lstm, input_bound=0.75, method="miller-hardt")
    assert not broken.stable
    assert any("‖W_f‖_∞" in reason for reason in broken.reasons)


def test_their_rate_bounds_what_trajectories_do() -> None:
    torch.manual_seed(3)
    lstm = nn.LSTM(D, 5, 2)
    with torch.no_grad():
        for name, parameter in lstm.named_parameters():
            parameter.mul_(0.02 if "weight_hh" in name else 0.3)
    certificate = certify(lstm, input_bound=1.0, method="miller-hardt")
    assert certificate.stable
    cell = certificate.cell
    first = torch.rand(200, cell.state_size, dtype=torch.float64) * certificate.invariant
    second = -first
    bound = (first - second).abs().amax(0)
    for _ in range(20):
        x = torch.rand(200, D, dtype=torch.float64).round() * 2 - 1
        first, second = cell.step(x, first), cell.step(x, second)
        bound = certificate.propagate(bound)
        assert bool(((first - second).abs() <= bound).all())
    assert not certificate.holds_for(torch.full((1, 1, D), 1.1))


def test_miller_hardt_is_about_rnn_and_lstm_only() -> None:
    assert certify(scaled_rows(nn.RNN(D, 4), 0.3), method="miller-hardt").stable
    assert certify(tie_input_gate(nn.LSTM(D, 4)), input_bound=1.0, method="miller-hardt").rate is not None
    with pytest.raises(InputError, match="GRUCell"):
        certify(nn.GRU(D, 4), method="miller-hardt")
    with pytest.raises(InputError, match="plain RNNs"):
        certify(nn.LSTM(D, 4), method="spectral")


# Models, cells of one's own, and what is printed ----------------------------------------------------------------------


def test_several_recurrent_modules_are_certified_one_by_one() -> None:
    model = nn.ModuleDict({"a": scaled_rows(nn.RNN(D, 4), 0.3), "b": scaled_rows(nn.GRU(4, 4), 0.2)})
    certificate = certify(model, input_bound=1.0)
    assert [layer.name for layer in certificate.layers] == ["a", "b"]
    assert certificate.stable
    assert certificate.rate == max(layer.rate for layer in certificate.layers)
    assert certificate.horizon(0.1) is None
    with pytest.raises(InputError, match="one recurrent module"):
        certificate.propagate(torch.ones(4))


class LeakyAverage(Cell):
    """h' = h/2 + x/2 with |x| ≤ 1."""

    def __init__(self, size: int) -> None:
        self.hidden_size = size

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        return (x + state) / 2

    def invariant(self) -> Tensor:
        return torch.ones(self.hidden_size, dtype=torch.float64)

    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        return e / 2 if input_error is None else (e + input_error) / 2


def test_a_cell_of_ones_own_is_certified() -> None:
    certificate = certify(LeakyAverage(3))
    assert (certificate.rate, certificate.horizon(0.25)) == (0.5, 2)
    stacked = certify(StackedCell([LeakyAverage(3), LeakyAverage(3)]))
    assert stacked.rate == pytest.approx(0.5, abs=1e-5)
    assert stacked.horizon(0.25) > 2
    with pytest.raises(InputError, match="states its own inputs"):
        certify(LeakyAverage(3), input_bound=1.0)


def test_the_reset_before_gru_is_a_cell() -> None:
    torch.manual_seed(0)
    cell = GRUCell(torch.randn(12, D), 0.05 * torch.randn(12, 4), inputs=BoxInput.bounded(1.0, D), reset_after=False)
    assert certify(cell).stable


def test_everything_is_plain_data() -> None:
    certificate = certify(scaled_rows(nn.RNN(D, 4, 2), 0.4))
    record = json.loads(json.dumps(certificate.to_dict()))
    assert record["horizon"] == {"0.01": certificate.horizon(0.01), "0.001": certificate.horizon(0.001)}
    assert [layer["stable"] for layer in record["layers"]] == [True, True]
    for again in (copy.deepcopy(certificate), pickle.loads(pickle.dumps(certificate))):
        assert again.to_dict() == certificate.to_dict()
    json.dumps(certify(nn.LSTM(D, 4)).to_dict(), allow_nan=False)


def test_the_repr_says_what_is_proved_and_when() -> None:
    text = repr(certify(scaled_rows(nn.RNN(D, 4, 2), 0.4), input_bound=1.0))
    for words in ("stable, rate", "horizon(0.01)", "between -1 and 1", "zero state", "layer 1: stable"):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"input_bound": 1.0, "embedding": torch.zeros(2, D)}, "only one of"),
        ({"input_bound": -1.0}, "input_bound"),
        ({"input_bound": math.nan}, "input_bound"),
        ({"inputs": torch.zeros(5, 2, D + 1)}, "reads 3 features"),
        ({"inputs": torch.zeros(5, 2, D).long()}, "embed the tokens"),
        ({"inputs": torch.zeros(0, 2, D)}, "empty"),
        ({"inputs": torch.full((5, 2, D), math.nan)}, "NaN"),
        ({"inputs": [1.0]}, "must be a tensor"),
        ({"embedding": "words"}, "nn.Embedding"),
        ({"h0": torch.full((1, 2, 4), math.inf)}, "h0 holds NaN or infinite"),
        ({"h0": torch.zeros(2, 2, 4)}, "1 layer"),
        ({"h0": torch.zeros(1, 0, 4)}, "h0 is empty"),
        ({"h0": 3}, "one tensor h"),
        ({"input_bound": True}, "input_bound"),
        ({"input_bound": torch.ones(2)}, "input_bound"),
    ],
)
def test_bad_arguments_get_one_sentence(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        certify(nn.GRU(D, 4), **arguments)
    assert "\n" not in str(caught.value)


def test_certificates_say_what_they_cannot_be_asked_about() -> None:
    certificate = certify(nn.GRU(D, 4), input_bound=1.0)
    for wrong, words in ((torch.zeros(5, 2, D + 1), "reads 3 features"), (numpy.zeros((5, 2, D)), "must be a tensor")):
        with pytest.raises(InputError, match=words):
            certificate.holds_for(wrong)
    for ask in (certificate.propagate, certificate.hidden):
        for wrong in (torch.ones(3), torch.tensor(1.0), [1.0] * 4):
            with pytest.raises(InputError, match=r"e must be a tensor \(\.\.\., 4\)"):
                ask(wrong)
    whole = certificate.propagate(torch.ones(2, 4, dtype=torch.float64))
    assert torch.equal(certificate.propagate(torch.ones(2, 4)), whole)


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf, "small", True, None])
def test_eps_must_be_a_positive_number(eps: object) -> None:
    with pytest.raises(InputError, match="eps"):
        certify(nn.RNN(D, 4)).horizon(eps)


def test_horizons_are_computed_once(monkeypatch) -> None:
    module = scaled_rows(nn.GRU(D, 4), 0.2)
    certificate, fresh, steps = (certify(module, input_bound=1.0), certify(module, input_bound=1.0), [])
    propagate = GRUCell.propagate
    monkeypatch.setattr(GRUCell, "propagate", lambda *given: (steps.append(1), propagate(*given))[1])
    assert fresh.horizon(1e-4) == certificate.horizon(1e-4)
    taken = len(steps)
    for again in (repr, Certificate.to_dict, lambda c: c.horizon(1e-4)):
        again(certificate)
    assert len(steps) < 1.5 * taken  # those of one horizon, and a few to see whether the others are settled
    repeated = len(steps)
    repr(certificate)
    assert len(steps) == repeated


@pytest.mark.parametrize("kind", FACTORIES)
def test_slopes_unit_by_unit_are_the_derivative_of_the_propagator(kind) -> None:
    cell = certify(random_module(kind, 1, 0.3, "dense", seed=4), input_bound=1.0).cell.cells[0]
    e = torch.rand(cell.state_size, dtype=torch.float64) + 0.1
    torch.testing.assert_close(cell.jacobian(e), torch.autograd.functional.jacobian(cell.propagate, e))


@pytest.mark.alone
def test_a_layer_that_forgets_slowly_is_certified_as_soon() -> None:
    torch.manual_seed(0)
    lstm = scaled_rows(nn.LSTM(64, 128), 0.001)
    with torch.no_grad():
        lstm.weight_ih_l0.mul_(0.1)
        lstm.bias_ih_l0[128:256] = 7 * torch.rand(128)
    started = time.process_time()
    certificate = certify(lstm, inputs=torch.randn(35, 8, 64))
    assert time.process_time() - started < 3
    assert 0.998 < certificate.rate < 1


@pytest.mark.alone
def test_a_layer_is_certified_in_seconds() -> None:
    started = time.perf_counter()
    certify(nn.LSTM(256, 256), inputs=torch.randn(35, 32, 256))
    assert time.perf_counter() - started < 10  # one second on a quiet machine: benchmarks/certify_speed.py


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_certificate_is_about_the_weights_as_they_were(dtype: torch.dtype) -> None:
    module = scaled_rows(nn.RNN(D, 4), 0.3).to(dtype)
    certificate = certify(module, input_bound=1.0)
    e = torch.rand(4, dtype=torch.float64)
    before, cell = certificate.propagate(e), copy.deepcopy(certificate.cell)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(10)
    assert torch.equal(certificate.propagate(e), before)
    assert torch.equal(certificate.cell.step(torch.ones(D).double(), e), cell.step(torch.ones(D).double(), e))


def test_the_module_is_left_as_it_was() -> None:
    module = nn.LSTM(D, 4, 2)
    before = copy.deepcopy(module.state_dict())
    assert isinstance(certify(module, inputs=torch.randn(5, 2, D)), Certificate)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert find_recurrent(module) == [("", module)]


def test_the_examples_of_the_documentation_run() -> None:
    page = Path(__file__).parents[1] / "docs" / "certificates.md"
    failed, tried = doctest.testfile(str(page), module_relative=False)
    assert failed == 0
    assert tried > 10


def test_the_papers_conditions_refuse_start_states_they_do_not_cover():
    lstm = nn.LSTM(2, 4)
    h0 = (torch.ones(1, 1, 4), 100 * torch.ones(1, 1, 4))
    with pytest.raises(InputError, match=r"states within \[-1, 1\]"):
        certify(lstm, input_bound=0.75, h0=h0, method="miller-hardt")


def test_every_start_state_a_model_uses_is_covered():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(2, 3)

        def forward(self, x):
            self.gru(x)
            return self.gru(x, torch.full((1, x.shape[1], 3), 5.0))

    x = torch.randn(4, 1, 2)
    certificate = certify(Twice(), inputs=x)
    assert certificate.holds_for(x, torch.full((1, 1, 3), 5.0))


@pytest.mark.parametrize("make", [lambda: nn.GRU(D, 4, 2), lambda: nn.LSTMCell(D, 4), lambda: StableLSTM(D, 4)])
def test_a_certificate_is_about_the_weights_that_were_used_and_no_others(make):
    module = make()
    certificate = certify(module, input_bound=1.0)
    assert certificate.is_about(module)
    assert certificate.is_about(copy.deepcopy(module).double())
    with torch.no_grad():
        module.get_parameter(next(name for name, _ in module.named_parameters() if "bias_hh" in name))[0] += 1
    assert not certificate.is_about(module)


def test_a_certificate_notices_that_a_parametrized_weight_changed():
    module = nn.utils.parametrizations.weight_norm(nn.RNN(D, 4), "weight_hh_l0")
    certificate = certify(module)
    assert certificate.is_about(module)
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(3)
    assert not certificate.is_about(module)


@pytest.mark.parametrize("given", [3, None, nn.GRU(D, 4).state_dict(), nn.LSTM])
def test_what_is_no_module_gets_one_sentence(given):
    with pytest.raises(InputError, match="give a module, such as"):
        certify(given, input_bound=1.0)


@pytest.mark.parametrize("h0", [3, (torch.zeros(1, 2, 4), 3), torch.zeros(1, 2, 4)])
def test_a_state_that_is_no_pair_gets_one_sentence(h0):
    with pytest.raises(InputError, match="a pair of tensors"):
        certify(nn.LSTM(D, 4), input_bound=1.0, h0=h0)
    with pytest.raises(InputError, match="different batch sizes"):
        certify(nn.LSTM(D, 4), input_bound=1.0, h0=(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)))


def test_weights_without_values_get_one_sentence():
    with pytest.raises(InputError, match="meta device"):
        certify(nn.LSTM(D, 4, device="meta"), input_bound=1.0)


@pytest.mark.parametrize("inputs", ["abc", torch.zeros(2, 3, 7), 3])
def test_inputs_a_model_cannot_run_on_get_one_sentence(inputs):
    model = nn.Sequential(nn.Linear(D, D), nn.GRU(D, 4)).train()
    with pytest.raises(InputError, match="running the model on the inputs failed") as caught:
        certify(model, inputs=inputs)
    assert "\n" not in str(caught.value)
    assert model.training


@pytest.mark.parametrize("bound", [1, numpy.float32(1), numpy.array(1.0), torch.tensor(1.0)])
def test_numbers_of_numpy_and_torch_are_numbers(bound):
    certificate = certify(scaled_rows(nn.GRU(D, 4), 0.2), input_bound=bound)
    assert "between -1 and 1" in certificate.assumptions[0]
    assert certificate.horizon(0.01 * bound) == certificate.horizon(0.01)


def test_the_readout_of_a_model_is_that_of_its_last_layer():
    model = nn.ModuleDict({"a": scaled_rows(nn.RNN(D, 4), 0.3), "b": scaled_rows(nn.GRU(4, 5), 0.2)})
    certificate = certify(model, input_bound=1.0, readout=nn.Linear(5, 2))
    assert [layer.readout.weight is None for layer in certificate.layers] == [True, False]
    text = repr(certificate)
    assert "one by one" in text
    assert "b: stable, rate" in text
    assert "horizon" not in text
    with pytest.raises(InputError, match="reads 4 units, but the last layer has 5"):
        certify(model, input_bound=1.0, readout=nn.Linear(4, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [StableLSTM, nn.GRU, nn.RNN])
def test_certify_where_gradients_are_off(make, mode):
    torch.manual_seed(0)
    layer = make(3, 24)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(0.3)
    rate = certify(layer, input_bound=1.0).rate
    with mode():
        assert certify(layer, input_bound=1.0).rate == pytest.approx(rate, rel=1e-9)


def test_hooks_are_outside_of_what_is_certified():
    layer = nn.RNN(2, 3)
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.eye(3) / 2)
    hook = layer.register_forward_pre_hook(lambda layer, args: (50 * args[0], *args[1:]))
    assert any("within its hooks" in sentence for sentence in certify(layer).assumptions)
    with pytest.raises(InputError, match="hooks that may change what it reads"):
        certify(layer, inputs=torch.randn(5, 2))
    outer = nn.Sequential(layer)
    behind = certify(outer, inputs=torch.ones(5, 2))
    assert behind.holds_for(50 * torch.ones(1, 1, 2))
    hook.remove()
    assert not any("hooks" in sentence for sentence in certify(layer).assumptions)
