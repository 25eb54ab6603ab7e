"""The truncation curve: known answers, exactness at the receptive field, bands, and bad input."""

import numpy as np
import pytest
import torch
from torch import nn

from unrecurrent.errors import InputError
from unrecurrent.memory import MemoryProfile, measure_memory
from unrecurrent.models import Interface, build_model, model_names
from unrecurrent.tasks.task import Example


def squared(outputs, targets):
    return (outputs - targets).square().sum(-1)


class Delay(nn.Module):
    """Returns the input `lag` steps back, zeros before."""

    def __init__(self, lag):
        super().__init__()
        self.lag = lag

    def forward(self, x):
        return torch.cat([torch.zeros_like(x[:, : self.lag]), x], 1)[:, : x.shape[1]]


@pytest.mark.parametrize("lag", [0, 1, 6, 21])
def test_delay_line_needs_exactly_its_length(lag):
    x = torch.randn(400, 2)
    y = Delay(lag)(x[None])[0]
    profile = measure_memory(Delay(lag), [(x, y + 0.01)], squared, positions=300)
    assert profile.k(0.01) == lag + 1
    assert profile.k_band(0.01) == (lag + 1, lag + 1)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_leaky_integrator_is_truncated_as_its_geometric_series_says(rate):
    """h_t = a h_{t−1} + x_t differs from its truncation by a^k h_{t−k}, whose mean square is a^{2k}/(1−a²)."""

    class Leaky(nn.Module):
        def forward(self, x):
            h, states = torch.zeros_like(x[:, 0]), []
            for t in range(x.shape[1]):
                h = rate * h + x[:, t]
                states.append(h)
            return torch.stack(states, 1)

    x = torch.randn(64, 300, 1)
    y = Leaky()(x)
    data = [(x[i], y[i]) for i in range(64)]
    profile = measure_memory(Leaky(), data, squared, ks=(1, 2, 4, 8), positions=8000)
    expected = np.array([rate ** (2 * k) / (1 - rate**2) for k in profile.ks])
    np.testing.assert_allclose(profile.losses.mean(1), expected, rtol=0.15)
    assert profile.full < 1e-10


@pytest.mark.parametrize("name", [name for name in model_names() if "seq2seq" not in name])
def test_curve_of_every_model_meets_the_full_loss(name):
    """At the longest sequence, and for feed-forward models at the receptive field, truncation changes nothing."""
    model = build_model(name, Interface(None, 3, 3), {"hidden_size": 6})
    data = [Example(x[:-1], x[1:]) for x in (torch.randn(n, 3) for n in (9, 40, 9, 23, 1_030))]
    reach = model.receptive_field or 1_029
    profile = measure_memory(model, data, squared, ks=(1, reach), positions=150)
    assert model.training
    np.testing.assert_allclose(profile.losses[-1], profile.full_losses, rtol=1e-4, atol=1e-5)
    assert not np.allclose(profile.losses[0], profile.full_losses, rtol=1e-4, atol=1e-5)


def test_loss_at_a_position_is_that_of_its_own_window():
    model = build_model("lstm", Interface(None, 3, 3), {"hidden_size": 6}).eval()
    x = torch.randn(12, 3)
    y = torch.randn(12, 3)
    profile = measure_memory(model, [(x, y)], squared, ks=(4,), positions=100)
    with torch.no_grad():
        outputs = [model(x[None, max(0, t - 3) : t + 1])[0, -1] for t in range(12)]
    naive = squared(torch.stack(outputs), y)
    np.testing.assert_allclose(profile.losses[0], naive, rtol=1e-4)


def test_sample_is_seeded_and_holds_no_position_twice():
    x = torch.arange(500.0)[:, None]
    curves = [
        measure_memory(Delay(0), [(x, 0 * x)], lambda o, t: o[..., 0], ks=(1,), positions=200, seed=s)
        for s in (0, 0, 1)
    ]
    values = [c.full_losses.tolist() for c in curves]
    assert values[0] == values[1] != values[2]
    assert len(set(values[0])) == 200


def test_band_covers_the_true_mean_about_as_often_as_stated():
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        losses = generator.exponential(1.0, (1, 400))
        ((_, _, low, high),) = MemoryProfile((1,), losses, losses[0]).curve
        inside += low <= 1.0 <= high
    assert 180 <= inside <= 199


def test_k_is_the_smallest_from_which_on_all_are_near():
    losses = np.array([[1.5], [1.005], [1.3], [1.008], [1.0]])
    profile = MemoryProfile((1, 2, 4, 8, 16), losses, np.array([1.0]))
    assert profile.k(0.01) == 8
    assert profile.k(0.001) == 16
    assert MemoryProfile((1, 2), losses[:1].repeat(2, 0), np.array([1.0])).k(0.01) is None


def test_negative_losses_are_compared_by_their_size():
    losses = np.array([[-2.0], [-2.985]])
    assert MemoryProfile((1, 2), losses, np.array([-3.0])).k(0.01) == 2


def test_profile_turns_into_json_safe_values():
    profile = measure_memory(Delay(2), [(torch.randn(50, 1), torch.randn(50, 1))], squared)
    described = profile.to_dict()
    assert described["label"] == "estimate"
    assert described["positions"] == 50
    assert described["ks"] == sorted(described["ks"])
    assert all(
        low <= mean <= high for low, mean, high in zip(*(described[k] for k in ("low", "mean", "high")), strict=True)
    )


def test_nothing_to_measure_and_reduced_losses_are_refused():
    with pytest.raises(InputError, match="nothing to measure"):
        measure_memory(Delay(1), [], squared)
    with pytest.raises(InputError, match="reduction='none'"):
        measure_memory(Delay(1), [(torch.randn(9, 1), torch.randn(9, 1))], nn.MSELoss())
    with pytest.raises(InputError, match="not float: use reduction='none'"):
        measure_memory(Delay(1), [(torch.randn(9, 1), torch.randn(9, 1))], lambda o, t: float((o - t).mean()))


class Forecaster(nn.Module):
    """A small LSTM over numbers, or over symbols."""

    def __init__(self, features=1, symbols=None):
        super().__init__()
        self.encode = nn.Identity() if symbols is None else nn.Embedding(symbols, features)
        self.lstm, self.readout = nn.LSTM(features, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.readout(self.lstm(self.encode(x))[0])


STEPS = torch.randn(30, 1)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (STEPS, r"for one sequence write \[\(inputs, targets\)\]"),
        ((STEPS, STEPS), r"for one sequence write \[\(inputs, targets\)\]"),
        (7, "data must be pairs"),
        ([(STEPS, torch.tensor(1.0))], "data must be pairs"),
        ([(np.array(["a"]), np.zeros(1))], "must be numbers, not <U1"),
        ([(STEPS.repeat(1, 2), STEPS)], r"fails on inputs of shape \(2, 30, 2\) and type torch.float32 "),
        ([(STEPS.long(), STEPS)], "fails on inputs of .* type torch.int64"),
        ([(STEPS, STEPS), (STEPS.repeat(1, 2), STEPS)], r"inputs of sequence 1 are \(2,\) of torch.float32 a step"),
        ([(STEPS, STEPS), (STEPS, STEPS[:, 0])], r"targets of sequence 1 are \(\) of"),
        ([(STEPS, STEPS), (STEPS.half(), STEPS)], r"inputs of sequence 1 are \(1,\) of torch.float16"),
        ([(np.full((30, 1), 1e300), STEPS)], "inputs of sequence 0 hold NaN or infinite"),
    ],
)
def test_data_in_another_form_are_one_sentence(data, said):
    with pytest.raises(InputError, match=said) as raised:
        measure_memory(Forecaster(), data, squared, positions=20)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("symbol", [-1, 9])
def test_symbols_that_the_model_does_not_know_are_one_sentence(symbol):
    x = torch.cat([torch.zeros(1100, dtype=torch.int64), torch.tensor([symbol])])
    with pytest.raises(InputError, match=r"fails on inputs of shape .* type torch.int64"):
        measure_memory(Forecaster(2, 9), [(x, x[:, None])], squared, positions=20)


def test_weights_that_are_nan_are_named_before_the_model_is_called_not_causal():
    model = Forecaster()
    with torch.no_grad():
        model.readout.bias.fill_(float("nan"))
    with pytest.raises(InputError, match="outputs are NaN on these data: check its weights"):
        measure_memory(model, [(STEPS, STEPS)], squared, scale=float("nan"))


def test_arrays_generators_and_float64_are_read():
    model, wide = Forecaster(), STEPS.double()
    losses = [
        measure_memory(model, data, squared, ks=(1,), positions=20, steps=30).losses
        for data in (
            [(STEPS, STEPS)] * 2,
            ((x, x) for x in (STEPS, STEPS)),
            [(wide, wide), (wide.numpy(), STEPS.numpy())],
        )
    ]
    assert all(np.array_equal(found, losses[0]) for found in losses)
    measure_memory(model.double(), [(wide, wide)], squared, ks=(1,), layers=False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"longest": 0}, "longest must be a whole number of at least 1"),
        ({"positions": 0}, "positions must be"),
        ({"steps": 0}, "steps must be"),
        ({"ks": [0]}, "each of ks must be"),
        ({"ks": []}, "ks is empty"),
        ({"ks": [1.5]}, "each of ks must be"),
        ({"exponents": -1}, "exponents must be a whole number of at least 0"),
        ({"exponents": "many"}, "exponents must be"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"scale": -1}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"delta": -1}, "delta must be a share"),
        ({"delta": float("nan")}, "delta must be a share"),
        ({"delta": None}, "delta must be a share"),
        ({"ks": np.array([0, 1])}, "each of ks must be"),
    ],
)
def test_settings_out_of_range_are_one_sentence(settings, said):
    x = torch.randn(20, 2)
    with pytest.raises(InputError, match=said):
        measure_memory(Delay(1), [(x, x)], squared, **settings)


def test_a_share_of_the_exponential_is_a_sum_in_nats():
    losses = np.array([[4.1], [4.02], [4.009], [4.0]])
    profile = MemoryProfile((1, 2, 3, 4), losses, np.array([4.0]), exponential=True)
    assert (profile.k(0.01), profile.k(0.03)) == (3, 2)
    assert MemoryProfile((1, 2, 3, 4), losses, np.array([4.0])).k(0.01) == 2
    assert "exponential of the loss" in profile.verdict()
