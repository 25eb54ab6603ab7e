"""Hypothesis tries to break what `stabilize` and the self-keeping layers promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unrecurrent.stability import StableLSTM, stabilize

KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM, "coupled": nn.LSTM}
seeds = st.integers(0, 2**31 - 1)
rates = st.sampled_from([0.3, 0.7, 0.9, 0.98, 0.995])
scales = st.sampled_from([0.1, 1.0, 3.0, 30.0])


def drawn(module, seed, scale):
    """The module with weights of any scale, some rows much heavier than others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            rows = torch.randn(len(parameter), *[1] * (parameter.dim() - 1), generator=generator).exp()
            parameter.copy_(
                scale * rows * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            )
    return module


@settings(max_examples=150, deadline=None)
@given(seed=seeds, kind=st.sampled_from(sorted(KINDS)), size=st.integers(1, 12), scale=scales, rate=rates)
def test_stabilized_modules_are_certified_at_the_rate(seed, kind, size, scale, rate):
    module = drawn(KINDS[kind](3, size), seed, scale)
    constraint = stabilize(module, rate=rate, input_bound=1.0, coupled=kind == "coupled")
    assert constraint.certificate().rate <= rate
    before = {name: value.clone() for name, value in module.state_dict().items()}
    constraint.project()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize(
    ("seed", "kind", "size", "rate"),
    [(1845867738, "gru", 11, 0.3), (2143777421, "coupled", 12, 0.98), (1229711485, "gru", 6, 0.995)],
)
def test_what_was_just_projected_is_certified_and_not_moved_again(seed, kind, size, rate):
    """Units just within their budgets, and rates close to 1, for which a search from other norms ends too early."""
    module = drawn(KINDS[kind](3, size), seed, 30.0)
    constraint = stabilize(module, rate=rate, input_bound=1.0, coupled=kind == "coupled")
    before = [parameter.detach().clone() for parameter in module.parameters()]
    assert constraint.certificate().rate <= rate
    constraint.project()
    for parameter, value in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, value, atol=3e-3, rtol=1e-3)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, size=st.integers(1, 12), scale=scales, rate=rates)
def test_stable_lstms_contract_in_their_norm_on_any_input(seed, size, scale, rate):
    """1,000 pairs of states a case, steered towards the boundary of the invariant set, each read the same input."""
    layer = drawn(StableLSTM(3, size, rate=rate), seed, scale).double()
    layer.project()
    generator = torch.Generator().manual_seed(seed)

    def states():
        c = (3 * torch.randn(1, 1000, size, generator=generator, dtype=torch.float64)).tanh()
        o = (3 * torch.randn(1, 1000, size, generator=generator, dtype=torch.float64)).sigmoid()
        return o * c.tanh(), c

    first, second = states(), states()
    near = [a + 1e-3 * (b - a) for a, b in zip(first, second, strict=True)]
    x = 5 * torch.randn(1, 1000, 3, generator=generator, dtype=torch.float64)
    for other in (second, near):
        before = distance(first, other, layer.norm_l0)
        with torch.no_grad():
            after = distance(layer(x, first)[1], layer(x, tuple(other))[1], layer.norm_l0)
        assert (after <= rate * before + 1e-13).all()


def distance(first, second, norm):
    """Max norm of the difference of two states, weighted by 1 / v, for each of the pairs."""
    (h, c), (h2, c2) = first, second
    return torch.stack(((c - c2).abs() / norm[0], (h - h2).abs() / norm[1])).amax((0, 1, 3))
