"""What a parallel run promises, tried on random modules, shapes and cuts."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from unrecurrent.certificate import certify
from unrecurrent.chunks import Plan
from unrecurrent.parallel import chunked_reference, run_parallel
from unrecurrent.stability import StableGRU, StableRNN
from unrecurrent.stable_lstm import StableLSTM
from unrecurrent.truncation import truncate, windowed_reference


@given(st.integers(2, 400), st.integers(1, 40), st.integers(0, 400))
@settings(max_examples=300, deadline=None)
def test_chunks_keep_every_step_once_and_warm_up_on_the_steps_before(steps, chunks, warmup):
    plan = Plan.cut(steps, chunks, warmup)
    read = {chunk: [] for chunk in range(plan.chunks)}
    kept = []
    at = 0
    for row, begin, end in plan.segments(block=7):
        assert begin == at < end <= begin + 7
        at = end
        for chunk in range(row, plan.chunks):
            positions = [plan.position(chunk, step) for step in range(begin, end)]
            read[chunk] += positions
            kept += positions if begin >= plan.warmup else []
    assert at == plan.warmup + plan.length
    assert sorted(kept) == list(range(steps))
    for chunk, positions in read.items():
        last = (chunk + 1) * plan.length - plan.offset - 1
        first = max(0, chunk * plan.length - plan.offset - plan.warmup)
        assert positions == list(range(first, last + 1))


def random_module(draw):
    kind = draw(st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    module = kind(2, draw(st.integers(1, 6)), num_layers=draw(st.integers(1, 2))).double()
    scale = draw(st.sampled_from([0.3, 1.0, 1.0, 2.0, 5.0]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(scale)
    return module


@st.composite
def cases(draw):
    module = random_module(draw)
    steps, batch = draw(st.integers(2, 150)), draw(st.integers(1, 3))
    options = {"chunks": draw(st.integers(1, 12)), "warmup": draw(st.integers(0, 80))}
    return module, torch.randn(steps, batch, 2, dtype=torch.float64), options


@given(cases(), st.sampled_from(["pilot", "outputs"]))
@settings(max_examples=200, deadline=None)
def test_the_answer_is_within_tol_or_the_modules_own(case, verify):
    module, x, options = case
    tol = 1e-5
    with torch.no_grad():
        own, own_state = module(x)
        y, state, evidence = run_parallel(module, x, tol=tol, verify=verify, **options)
    parts = zip([y, *torch.atleast_1d(state)], [own, *torch.atleast_1d(own_state)], strict=True)
    if evidence.mode == "sequential":
        assert all(torch.equal(a, b) for a, b in parts)
        return
    # the gain is measured along one random direction; a dozen state components can hide a factor of three
    assert all((a - b).abs().max() <= 4 * tol for a, b in parts)
    assert evidence.error_estimate <= tol


@st.composite
def certified_cases(draw):
    kind, rate = draw(st.sampled_from([nn.RNN, nn.GRU, StableRNN, StableGRU, StableLSTM])), draw(st.floats(0.5, 0.98))
    torch.manual_seed(draw(st.integers(0, 10_000)))
    options = {} if kind in (nn.RNN, nn.GRU) else {"rate": rate}
    module = kind(2, draw(st.integers(1, 20)), num_layers=draw(st.integers(1, 3)), **options).double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(0.3 if "weight_hh" in name and not options else 1.0)
    x = torch.rand(draw(st.integers(40, 300)), draw(st.integers(1, 3)), 2, dtype=torch.float64) * 2 - 1
    return module, x, {"chunks": draw(st.integers(2, 20)), "warmup": draw(st.integers(0, 10))}


@given(certified_cases(), st.sampled_from([0.05, 5.0]))
@settings(max_examples=100, deadline=None)
def test_no_output_is_further_off_than_what_is_proved(case, tol):
    """Warm-ups far too short, so that starts are far off; a small tol has the error followed step by step."""
    module, x, options = case
    certificate = certify(module, input_bound=1.0)
    with torch.no_grad():
        y, _, evidence = run_parallel(module, x, tol=tol, certificate=certificate, **options)
        own, _ = module(x)
    if evidence.bound is not None:
        assert float((y - own).abs().max()) <= evidence.bound * (1 + 1e-9) + 1e-12


@given(cases())
@settings(max_examples=60, deadline=None)
def test_gradients_are_those_of_the_plain_reference(case):
    module, x, options = case
    x.requires_grad_()
    y, _, evidence = run_parallel(module, x, tol=1e3, **options)
    if evidence.mode == "sequential":
        return
    expected = chunked_reference(module, x, None, **options)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)
    wrt = [x, *module.parameters()]
    got, wanted = (torch.autograd.grad(out.square().sum(), wrt) for out in (y, expected))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-7)


@given(cases(), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_truncation_is_the_reference(case, k):
    module, x, _ = case
    with torch.no_grad():
        torch.testing.assert_close(truncate(module, k)(x), windowed_reference(module, x, k), atol=1e-9, rtol=1e-9)
