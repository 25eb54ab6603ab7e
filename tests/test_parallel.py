import copy
import subprocess
import sys
import time
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from late_look import LooksLate, late_inputs
from unrecurrent import engines, kernels, parallel
from unrecurrent.certificate import certify
from unrecurrent.engines import (
    LoopEngine,
    ModuleEngine,
    forget_costs,
    learn_sequential_step,
    parts_of,
    sequential_step,
)
from unrecurrent.errors import InputError
from unrecurrent.lyapunov import _prepare_forward_mode
from unrecurrent.parallel import Parallel, chunked_reference, run_parallel
from unrecurrent.speed import one_thread
from unrecurrent.stability import StableGRU, StableRNN
from unrecurrent.stable_lstm import StableLSTM
from unrecurrent.stock import is_stock

pytestmark = pytest.mark.alone
KINDS = [nn.RNN, nn.GRU, nn.LSTM]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def start(module, batch):
    layers = module.num_layers * (2 if module.bidirectional else 1)
    h = 0.5 * torch.randn(layers, batch, module.hidden_size)
    return (h, torch.randn(layers, batch, module.hidden_size)) if isinstance(module, nn.LSTM | StableLSTM) else h


def parts(state):
    return state if isinstance(state, tuple) else (state,)


def assert_same(got, wanted, atol):
    torch.testing.assert_close(got[0], wanted[0], atol=atol, rtol=0)
    for a, b in zip(parts(got[1]), parts(wanted[1]), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def assert_fell_back(module, x, h0, **options):
    """The answer is the module's own, bit for bit."""
    y, state, evidence = run_parallel(module, x, h0, **options)
    own_y, own_state = module(x, h0)
    assert evidence.mode == "sequential"
    assert evidence.fallback
    assert torch.equal(y, own_y)
    assert all(torch.equal(a, b) for a, b in zip(parts(state), parts(own_state), strict=True))
    return evidence


# The answer is the sequential one -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, StableLSTM])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("steps", "chunks", "warmup"), [(63, 4, 40), (331, 7, 40), (200, 9, 61), (40, 2, 39)])
def test_agrees_with_the_sequential_run(kind, batch, steps, chunks, warmup):
    module = kind(3, 5, num_layers=2)
    x, h0 = torch.randn(steps, batch, 3), start(module, batch)
    for verify in ("pilot", "outputs"):
        with torch.no_grad():
            y, state, evidence = run_parallel(module, x, h0, chunks=chunks, warmup=warmup, verify=verify)
        assert_same((y, state), module(x, h0), 1e-4)
        assert evidence.mode == "parallel"
        assert evidence.max_mismatch * max(1.0, evidence.gain) <= 1e-4


def test_first_chunk_starts_from_the_true_state():
    module = nn.LSTM(3, 5)
    h0 = (torch.zeros(1, 1, 5), torch.full((1, 1, 5), 30.0))  # zeros warmed up on padding are far from this
    x = torch.randn(200, 1, 3)
    y, state, evidence = run_parallel(module, x, h0, chunks=4, warmup=60)
    assert evidence.mode == "parallel"
    assert_same((y, state), module(x, h0), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind):
    module = kind(3, 5, batch_first=True)
    x, h0 = torch.randn(2, 150, 3), start(module, 2)
    y, state, evidence = run_parallel(module, x, h0, chunks=5, warmup=40)
    assert evidence.mode == "parallel"
    assert_same((y, state), module(x, h0), 1e-4)
    one, h_one = x[0], start(module, 1)
    h_one = tuple(part[:, 0] for part in h_one) if isinstance(h_one, tuple) else h_one[:, 0]
    y, state, evidence = run_parallel(module, one, h_one, chunks=5, warmup=40)
    assert evidence.mode == "parallel"
    assert_same((y, state), module(one, h_one), 1e-4)
    assert_same(run_parallel(module, one.numpy(), chunks=5, warmup=40)[:2], module(one), 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_bidirectional(kind, layers):
    module = kind(3, 5, num_layers=layers, bidirectional=True)
    x, h0 = torch.randn(301, 2, 3), start(module, 2)
    y, state, evidence = run_parallel(module, x, h0, chunks=4, warmup=45)
    assert evidence.mode == "parallel"
    assert evidence.error_estimate <= 1e-4
    assert_same((y, state), module(x, h0), 1e-4)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("enforce_sorted", [False, True])
def test_packed_sequence(bidirectional, enforce_sorted):
    module = nn.LSTM(3, 5, bidirectional=bidirectional)
    lengths = [210, 150, 150, 99] if enforce_sorted else [99, 210, 150, 150]
    packed = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=enforce_sorted)
    h0 = start(module, 4)
    y, state, evidence = run_parallel(module, packed, h0, chunks=3, warmup=45)
    own, own_state = module(packed, h0)
    assert evidence.mode == "parallel"
    assert_same((y.data, state), (own.data, own_state), 1e-4)
    assert torch.equal(y.batch_sizes, own.batch_sizes)


def test_packed_sequence_falls_back_whole():
    module = chaotic(nn.LSTM)
    packed = pack_padded_sequence(torch.randn(400, 2, 3), torch.tensor([400, 300]))
    y, _, evidence = run_parallel(module, packed, chunks=4, warmup=50)
    assert evidence.mode == "sequential"
    assert torch.equal(y.data, module(packed)[0].data)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_too_short_for_chunks_run_together(bidirectional):
    """They do not throw away what was gained on the others."""
    module = nn.LSTM(3, 5, bidirectional=bidirectional)
    lengths = [1, 210, 1, 150]
    packed = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=False)
    h0 = start(module, 4)
    y, state, evidence = run_parallel(module, packed, h0, chunks=3, warmup=45)
    own, own_state = module(packed, h0)
    assert evidence.mode == "parallel"
    assert evidence.note == "2 of 4 sequences, the shortest, ran step by step"
    assert evidence.steps == sum(lengths)
    assert_same((y.data, state), (own.data, own_state), 1e-4)


def test_packed_sequences_are_compared_with_the_run_of_the_whole_batch():
    """Sixty-four sequences at once are already parallel: running one after the other in chunks would be no gain."""
    module, x = nn.LSTM(3, 64), torch.randn(1500, 64, 3)
    with torch.no_grad():
        y, _, evidence = run_parallel(module, pack_padded_sequence(x, torch.full((64,), 1500)))
        torch.testing.assert_close(y.data, module(x)[0].flatten(0, 1), atol=1e-4, rtol=0)
    assert evidence.mode == "sequential"


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_cell_modules(cell):
    module, x, state, outputs = cell(3, 5), torch.randn(150, 2, 3), None, []
    for x_t in x:
        state = module(x_t, state)
        outputs.append(parts(state)[0])
    y, last, _ = run_parallel(module, x, chunks=3, warmup=40)
    torch.testing.assert_close(y, torch.stack(outputs), atol=1e-4, rtol=0)
    torch.testing.assert_close(parts(last)[0][0], outputs[-1], atol=1e-4, rtol=0)


class Leaky(nn.Module):
    """A user's own module with nn.GRU's call: integer inputs, h ← 0.8 h + embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, x, hx=None):
        h, outputs = torch.zeros(1, x.shape[1], 4) if hx is None else hx, []
        for drive in self.table(x):
            h = 0.8 * h + drive
            outputs.append(h[0])
        return torch.stack(outputs), h


def test_any_module_with_the_same_call():
    module, x = Leaky(), torch.randint(7, (300, 2))
    y, state, evidence = run_parallel(module, x, chunks=5, warmup=55)
    assert evidence.mode == "parallel"
    assert_same((y, state), module(x), 1e-4)


def test_module_in_the_place_of_the_original():
    gru = nn.GRU(3, 5)
    fast, x = Parallel(gru, chunks=4, warmup=40), torch.randn(200, 1, 3)
    assert_same(fast(x), gru(x), 1e-4)
    assert fast.evidence.mode == "parallel"
    twin = copy.deepcopy(fast)
    assert_same(twin(x), gru(x), 1e-4)
    assert set(fast.state_dict()) == {f"module.{name}" for name in gru.state_dict()}


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, StableLSTM])
def test_gradients_are_those_of_the_plain_reference(kind):
    module = kind(3, 5, num_layers=2).double()
    x = torch.randn(63, 2, 3, dtype=torch.float64, requires_grad=True)
    h0 = tuple(part.double().requires_grad_() for part in parts(start(module, 2)))
    wrt = [x, *h0, *module.parameters()]
    packed = h0 if len(h0) > 1 else h0[0]
    weights = torch.randn(63, 2, 5, dtype=torch.float64)
    y, _, evidence = run_parallel(module, x, packed, tol=1e-1, chunks=4, warmup=11)
    assert evidence.sweeps == 0
    expected = chunked_reference(module, x, packed, chunks=4, warmup=11)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    got = torch.autograd.grad((y * weights).sum(), wrt)
    wanted = torch.autograd.grad((expected * weights).sum(), wrt)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_gradients_of_a_contracting_module_are_those_of_the_whole_run():
    module = nn.GRU(3, 5).double()
    x = torch.randn(210, 1, 3, dtype=torch.float64)
    got = torch.autograd.grad(
        run_parallel(module, x, tol=1e-9, chunks=3, warmup=69)[0].square().sum(), module.parameters()
    )
    wanted = torch.autograd.grad(module(x)[0].square().sum(), module.parameters())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


# Where recurrence is needed -------------------------------------------------------------------------------------------


def chaotic(kind, size=32):
    module = kind(3, size)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(5)
    return module


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", [{}, {"chunks": 8, "warmup": 100}, {"chunks": 4}])
def test_chaotic_modules_fall_back_bit_for_bit(kind, batch, options):
    module = chaotic(kind)
    with torch.no_grad():
        assert_fell_back(module, 0.1 * torch.randn(2000, batch, 3), start(module, batch), **options)


def test_integrating_cell_falls_back():
    module = nn.LSTM(3, 8)
    with torch.no_grad():
        module.bias_ih_l0[8:16] = 40.0  # forget gates at 1: the state is a sum over all of the past
        module.weight_hh_l0.zero_()
        x = torch.randn(3000, 1, 3)
        for options in ({}, {"chunks": 5, "warmup": 200}, {"chunks": 5}):
            assert_fell_back(module, x, None, **options)


class Leak(nn.Module):
    """h ← a h + u, with a and u the two inputs."""

    def forward(self, x, hx=None):
        h, outputs = torch.zeros(1, x.shape[1], 1) if hx is None else hx, []
        for step in x:
            h = step[:, :1] * h + step[:, 1:]
            outputs.append(h[0])
        return torch.stack(outputs), h


def bursts(growth, length, first=0):
    """A leak of 0.5 that grows instead, `length` steps long, from `first` steps behind each boundary of 100 steps."""
    x = torch.stack([torch.full((800, 1), 0.5), torch.rand(800, 1)], dim=-1)
    for boundary in range(100, 800, 100):
        x[boundary + first : boundary + first + length, :, 0] = growth
    return x


@pytest.mark.parametrize("verify", ["pilot", "outputs"])
def test_transient_growth_inside_a_chunk_is_mended(verify):
    """At each boundary the mismatch is below tol, but it grows twentyfold inside the chunk and shrinks again."""
    module, x, options = Leak(), bursts(1.4, 9), {"chunks": 8, "warmup": 9}
    own, unchecked = module(x), chunked_reference(module, x, None, **options)
    assert (unchecked - own[0])[99::100].abs().max() < 5e-3 < 2e-2 < (unchecked - own[0]).abs().max()
    y, state, evidence = run_parallel(module, x, tol=5e-3, verify=verify, **options)
    assert evidence.mode == "parallel"
    assert evidence.sweeps > 0
    assert evidence.gain == pytest.approx(1.4**9, rel=0.01)
    assert_same((y, state), own, 5e-3)


def test_growth_beyond_rounding_falls_back():
    evidence = assert_fell_back(Leak(), bursts(3.0, 14, first=1), None, chunks=8, warmup=30)
    assert "grow" in evidence.fallback


def test_slow_stretch_is_swept():
    """A leak that pauses for a while: the chunk behind needs its predecessor's state, the others do not."""
    x = torch.stack([torch.full((400, 1), 0.5), torch.rand(400, 1)], dim=-1).double()
    x[195:260, :, 0] = 1.0
    y, state, evidence = run_parallel(Leak(), x, chunks=8, warmup=25)
    assert evidence.mode == "parallel"
    assert evidence.sweeps in (1, 2)
    assert_same((y, state), Leak()(x), 1e-4)


def test_errors_of_short_chunks_add_up():
    """With chunks far shorter than the memory every start state inherits the errors of those before it."""
    x = torch.stack([torch.full((600, 1), 0.97), torch.rand(600, 1)], dim=-1).double()
    y, _, evidence = run_parallel(Leak(), x, tol=1.0, chunks=120, warmup=150)
    off = (y - Leak()(x)[0]).abs().max().item()
    assert evidence.sweeps == 0
    assert evidence.max_mismatch * max(1.0, evidence.gain) < off / 2
    assert off <= evidence.error_estimate < 2 * off


def test_latch_set_by_a_rare_event_falls_back():
    """Two stable states; only what came before a boundary tells which one is the true one."""
    module = nn.RNN(1, 1, bias=False)
    with torch.no_grad():
        module.weight_hh_l0.fill_(3.0)
        module.weight_ih_l0.fill_(1.0)
        x = torch.zeros(4000, 1, 1)
        x[300], x[301:] = 9.0, -0.02
        for options in (
            {"chunks": 10, "warmup": 100},
            {"chunks": 10},
            {"chunks": 40, "warmup": 90, "verify": "outputs"},
        ):
            assert_fell_back(module, x, None, **options)


def test_inputs_with_unusual_strides():
    module = nn.GRU(3, 5)
    strided, shared = torch.randn(600, 3, 2)[::2].transpose(1, 2), torch.randn(300, 1, 3).expand(300, 2, 3)
    for x in (strided, shared, torch.randn(1, 1, 3).expand(300, 1, 3)):
        assert_same(run_parallel(module, x, chunks=4, warmup=45)[:2], module(x), 1e-4)


def test_bidirectional_writes_to_out():
    module, x = nn.LSTM(3, 5, bidirectional=True), torch.randn(300, 2, 3)
    for options in ({"chunks": 4, "warmup": 45}, {"chunks": 1}):
        out = torch.empty(300, 2, 10)
        _, state, _ = run_parallel(module, x, out=out, **options)
        with torch.no_grad():
            assert_same((out, state), module(x), 1e-4)


def test_rounding_near_the_stability_limit_falls_back():
    module = nn.RNN(1, 1, bias=False, nonlinearity="relu")
    with torch.no_grad():
        module.weight_hh_l0.fill_(0.999)
        module.weight_ih_l0.fill_(1.0)
        x = 0.1 * torch.rand(60_000, 1, 1)
        reason = assert_fell_back(module, x, None, chunks=4).fallback
    assert "rounding" in reason or "remembers" in reason
    with torch.no_grad():
        y, state, evidence = run_parallel(module.double(), x.double(), chunks=4)
    assert evidence.mode == "parallel"
    assert_same((y, state), module(x.double()), 1e-4)


def silero_features(weights, wave):
    """The detector's front end: frames of 576 samples, magnitudes of a short-time Fourier transform, four layers."""
    frames = nn.functional.pad(wave.unfold(0, 576, 512)[:, None], (0, 64), mode="reflect")
    spectrum = nn.functional.conv1d(frames, weights["stft_conv.weight"], stride=128)
    x = torch.hypot(spectrum[:, :129], spectrum[:, 129:])
    for layer, stride in enumerate((1, 2, 2, 1), start=1):
        weight, bias = weights[f"conv{layer}.weight"], weights[f"conv{layer}.bias"]
        x = torch.relu(nn.functional.conv1d(x, weight, bias, stride=stride, padding=1))
    return x.transpose(1, 2)


def speech(data_dir):
    files = sorted((data_dir / "digits").glob("*.wav"))
    if not files:
        pytest.skip("the data set digits is not there")
    waves = [np.frombuffer(path.read_bytes()[44:], dtype="<i2") for path in files]
    wave = torch.from_numpy(np.concatenate(waves).astype(np.float32) / 32768)
    return nn.functional.interpolate(wave[None, None], scale_factor=2.0, mode="linear")[0, 0]  # 8 to 16 kHz


def test_voice_activity_lstm_is_seen_to_need_its_recurrence(data_dir):
    """A trained LSTM with recurrent norm 27, on recorded speech through its own front end."""
    path = data_dir / "trained" / "silero-vad" / "silero_vad_16k.safetensors"
    if not path.exists():
        pytest.skip("the trained model silero-vad is not there")
    weights, module = load_file(path), nn.LSTM(128, 128)
    module.load_state_dict(
        {f"{name.split('.')[1]}_l0": w for name, w in weights.items() if name.startswith("lstm_cell")}
    )
    with torch.no_grad():
        x = silero_features(weights, speech(data_dir))
        assert len(x) > 4000
        for options in ({}, {"chunks": 8, "warmup": 256}, {"chunks": 4, "verify": "outputs"}, {"tol": 1e-2}):
            assert_fell_back(module, x, None, **options)


@pytest.fixture(name="one_thread")
def on_one_thread():
    """Processor time is then that of the run: threads that wait for others count in it, too."""
    with one_thread():
        yield


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
def test_costs_little_where_nothing_can_be_gained(kind):
    """Processor time, so that other work on the machine does not count; the first call measures the machine too."""
    module = chaotic(kind, 64) if kind is nn.RNN else kind(3, 64)
    if kind is not nn.RNN:  # a forget gate, or the update gate, that keeps the state for thousands of steps
        module.bias_ih_l0.data[64:128] = 9.0
    x = torch.randn(60_000, 1, 3)

    def seconds(run):
        begun = time.process_time()
        result = run()
        return time.process_time() - begun, result

    with torch.no_grad():
        alone, attempts = [], []
        for _ in range(5):
            forget_costs()
            alone.append(seconds(lambda: module(x))[0])
            taken, (_, _, evidence) = seconds(lambda: run_parallel(module, x))
            assert evidence.mode == "sequential"
            attempts.append(taken)
    assert median(attempts) <= 1.5 * median(alone)


@pytest.fixture
def saves_less_than_half(monkeypatch):
    """A machine on which a parallel run of 20,000 steps costs 0.55 of the sequential one."""
    cost = engines.StepCost(sequential=1.0, fixed=1.0, per_row=0.5)
    monkeypatch.setattr("unrecurrent.pilot.step_cost", lambda engine, plain, x: cost)


@pytest.mark.usefixtures("saves_less_than_half")
def test_what_saves_less_than_half_is_tried_on_a_part_first():
    module, x = nn.GRU(3, 5), torch.randn(20_000, 1, 3)
    with torch.no_grad():
        y, state, evidence = run_parallel(module, x, warmup=20)
        wanted, wanted_state = module(x)
    assert (evidence.mode, evidence.steps) == ("parallel", 20_000)
    assert evidence.sequential_depth > 2 * 20  # two spans, each with its warm-up
    assert torch.allclose(y, wanted, atol=1e-4)
    assert torch.allclose(state, wanted_state, atol=1e-4)


@pytest.mark.usefixtures("saves_less_than_half")
@pytest.mark.parametrize("rough", [slice(0, 2500), slice(12_000, 13_000)], ids=["in the part", "after it"])
def test_the_module_runs_where_a_part_or_what_follows_it_fails(rough):
    class Kept(nn.Module):
        """An RNN that keeps its state for ever where the second input is not 0."""

        def forward(self, x, h):
            h = x.new_zeros(1, x.shape[1], 1) if h is None else h
            outputs = []
            for now in x:
                h = torch.where(now[:, 1:] != 0, h + now[:, :1], torch.tanh(0.1 * h + now[:, :1]))
                outputs.append(h[0])
            return torch.stack(outputs), h

    x = torch.randn(20_000, 1, 2)
    x[:, :, 1] = 0
    x[rough, :, 1] = 1
    module = Kept()
    with torch.no_grad():
        y, state, evidence = run_parallel(module, x, warmup=20)
        wanted, wanted_state = module(x, None)
    assert evidence.mode == "sequential"
    assert torch.equal(y, wanted)
    assert torch.equal(state, wanted_state)


# Evidence -------------------------------------------------------------------------------------------------------------


def test_evidence_tells_what_was_done():
    module, x = nn.GRU(3, 5), torch.randn(800, 1, 3)
    with torch.no_grad():
        _, _, evidence = run_parallel(module, x, chunks=8, warmup=50)
    assert (evidence.chunks, evidence.warmup, evidence.sweeps, evidence.gain_chunks) == (8, 50, 0, 7)
    assert 150 <= evidence.sequential_depth <= 250  # warm-up and chunk, then the pilot's second run
    assert evidence.bound is None
    from_boundaries = evidence.max_mismatch * max(1.0, evidence.gain)
    assert from_boundaries <= evidence.error_estimate <= 1.1 * from_boundaries + 1e-6  # and what rounding adds
    assert "8 chunks" in str(evidence)
    assert "(measured)" in str(evidence)
    assert evidence.to_dict()["steps"] == 800


def test_auto_chooses_a_warmup_that_forgets():
    module, x = nn.LSTM(3, 16), torch.randn(6000, 1, 3)
    with torch.no_grad():
        y, state, evidence = run_parallel(module, x, chunks=10)
        assert_same((y, state), module(x), 1e-4)
    assert evidence.mode == "parallel"
    assert 8 <= evidence.warmup <= 100
    assert 0.3 < evidence.forgetting_rate < 0.9


def test_auto_never_answers_wrongly():
    for kind in KINDS:
        module, x = kind(3, 16), torch.randn(8000, 1, 3)
        with torch.no_grad():
            assert_same(run_parallel(module, x)[:2], module(x), 1e-4)
            assert_same(run_parallel(module, x[:500])[:2], module(x[:500]), 0)


CERTIFIED = [
    lambda: nn.GRU(3, 5, num_layers=2),
    lambda: StableLSTM(3, 5, rate=0.9),
    lambda: StableRNN(3, 24, rate=0.8),
    lambda: StableRNN(3, 12, num_layers=2, rate=0.6),
]


@pytest.mark.parametrize("make", CERTIFIED)
@pytest.mark.parametrize("warmup", [3, 12, 30])
def test_certificate_bounds_every_output(make, warmup):
    module = make().double()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if type(module) is nn.GRU and "weight_hh" in name:
                weight.mul_(0.2)
    x, h0 = torch.rand(300, 2, 3, dtype=torch.float64) * 2 - 1, None
    certificate = certify(module, input_bound=1.0)
    assert certificate.stable
    with torch.no_grad():
        y, _, evidence = run_parallel(module, x, h0, tol=0.5, chunks=6, warmup=warmup, certificate=certificate)
        off = (y - module(x)[0]).abs().max().item()
    assert evidence.mode == "parallel"
    assert evidence.gain is None  # no second run
    assert 0 < evidence.bound <= 0.5
    assert off <= evidence.bound
    assert "(proved)" in str(evidence)


def test_a_slow_certificate_bounds_short_chunks():
    """Over a few steps errors may grow before they fall; in the norm of the proof they fall from the first step on."""
    module, x = StableLSTM(3, 40, rate=0.999).double(), torch.rand(300, 1, 3, dtype=torch.float64)
    certificate = certify(module)
    assert any(proof.contracts and proof.method == "componentwise" for proof in certificate.proofs)
    with torch.no_grad():
        y, _, evidence = run_parallel(module, x, tol=0.5, chunks=60, warmup=3, certificate=certificate)
        off = (y - module(x)[0]).abs().max().item()
    assert evidence.mode == "parallel"
    assert evidence.bound is not None
    assert 0 < off <= evidence.bound


@torch.no_grad()
def test_a_certificate_proves_nothing_after_a_span_that_was_only_measured(monkeypatch):
    """In the first of two spans an input lies outside of what is certified; what its end is off by is then measured."""
    module = nn.RNN(1, 1, num_layers=2, nonlinearity="relu").double()
    for parameter in module.parameters():
        parameter.zero_()
    for name, value in (
        ("weight_ih_l0", 1.0),
        ("weight_hh_l0", 0.9),
        ("weight_ih_l1", 50.0),
        ("bias_ih_l1", -601.0),
        ("weight_hh_l1", 0.1),
    ):
        getattr(module, name).fill_(value)
    x = torch.ones(400, 1, 1, dtype=torch.float64)
    x[0], x[200:210], x[210:] = 3.5, 3.0, -3.0
    monkeypatch.setattr(parallel, "_SPAN_BYTES", 1)
    monkeypatch.setattr(parallel, "_SHORTEST", 100)
    certificate, out = certify(module, input_bound=3.0), torch.empty(400, 1, 1, dtype=torch.float64)
    assert certificate.stable
    run_parallel(module, x, chunks=10, warmup=50, tol=0.1, certificate=certificate, out=out)
    assert (out - module(x)[0]).abs().max() <= 0.1


def test_certificate_that_does_not_hold_is_not_used():
    module, x = StableLSTM(3, 5, rate=0.9), torch.randn(300, 1, 3)
    certificate = certify(module, input_bound=0.01)
    with torch.no_grad():
        evidence = run_parallel(module, x, chunks=4, warmup=60, certificate=certificate)[2]
    assert evidence.bound is None
    assert evidence.gain is not None
    assert "does not hold" in evidence.note


# Long sequences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [True, False])
def test_writes_to_out_span_after_span(array, monkeypatch):
    monkeypatch.setattr("unrecurrent.parallel._SPAN_BYTES", 200_000)
    module = nn.LSTM(3, 5, batch_first=True)
    x, h0 = torch.randn(2, 12_000, 3), start(module, 2)
    out = np.empty((2, 12_000, 5), np.float32) if array else torch.empty(2, 12_000, 5)
    given = x.numpy() if array else x
    y, state, evidence = run_parallel(module, given, h0, chunks=10, warmup=60, out=out)
    assert y is out
    assert evidence.chunks > 10  # more than one span
    with torch.no_grad():
        assert_same((torch.as_tensor(out), state), module(x, h0), 1e-4)
        needing = chaotic(nn.LSTM)
        long = torch.randn(12_000, 1, 3)
        out = torch.empty(12_000, 1, 32)
        _, state, evidence = run_parallel(needing, long, out=out)
        assert evidence.mode == "sequential"
        assert torch.isfinite(out).all()


def test_memory_mapped_sequence_runs_in_bounded_memory(tmp_path):
    """Anonymous memory of a process that maps 64 MB of inputs and 128 MB of outputs grows by far less."""
    script = """
import sys, threading, time, numpy as np, torch
from unrecurrent import run_parallel
import unrecurrent.parallel as p
p._SPAN_BYTES = 1 << 24
def rss():
    return int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1]) / 1024
steps, folder = 4_000_000, sys.argv[1]
x = np.memmap(folder + '/x', np.float32, 'w+', shape=(steps, 1, 4))
for begin in range(0, steps, 100_000):
    x[begin : begin + 100_000] = np.random.default_rng(begin).normal(size=(100_000, 1, 4))
x = np.memmap(folder + '/x', np.float32, 'r', shape=(steps, 1, 4))
out = np.memmap(folder + '/y', np.float32, 'w+', shape=(steps, 1, 8))
gru = torch.nn.GRU(4, 8)
run_parallel(gru, np.array(x[:2000]), chunks=2, warmup=60)
before, peak, done = rss(), [0.0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], rss())
        time.sleep(0.005)
thread = threading.Thread(target=watch); thread.start()
evidence = run_parallel(gru, x, chunks=400, warmup=60, out=out)[2]
done.set(); thread.join()
last = torch.from_numpy(np.array(x[-3000:]))
off = float((gru(last)[0][200:] - torch.from_numpy(np.array(out[-2800:]))).abs().max())
print(evidence.mode, evidence.steps, off < 1e-4, peak[0] - before < 90, peak[0] - before)
"""
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stdout.split()[:4] == ["parallel", "4000000", "True", "True"], ran.stdout + ran.stderr


# Bad input ------------------------------------------------------------------------------------------------------------


class OutputsOnly(nn.Module):
    def forward(self, x, hx=None):
        return x


def one_sentence(match):
    return pytest.raises(InputError, match=match)


def test_bad_input_gets_one_sentence():
    module, x = nn.LSTM(3, 5), torch.randn(100, 2, 3)
    with one_sentence("NaN"):
        run_parallel(module, torch.where(torch.arange(100)[:, None, None] == 70, float("nan"), x))
    with one_sentence("h0 holds NaN"):
        run_parallel(module, x, (torch.full((1, 2, 5), float("nan")), torch.zeros(1, 2, 5)))
    with one_sentence("at least one step"):
        run_parallel(module, x[:0])
    with one_sentence("reads 3 inputs"):
        run_parallel(module, torch.randn(100, 2, 4))
    with one_sentence("h0 has shape"):
        run_parallel(module, x, (torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)))
    with one_sentence("16 eps"):
        run_parallel(module, x, tol=1e-6)
    with one_sentence("convert"):
        run_parallel(module, x.numpy().astype(np.float64))
    with one_sentence("PackedSequence"):
        run_parallel(module, pack_sequence([x[:, 0]]), out=torch.empty(100, 1, 5))
    with one_sentence("chunks"):
        run_parallel(module, x, chunks=0)
    with one_sentence("verify"):
        run_parallel(module, x, verify="twice")
    with one_sentence("eval"):
        run_parallel(nn.LSTM(3, 5, num_layers=2, dropout=0.5), x)
    with one_sentence("out has shape"):
        run_parallel(module, x, chunks=2, warmup=20, out=torch.empty(99, 2, 5))
    with one_sentence("must return"):
        run_parallel(OutputsOnly(), x)
    with one_sentence("h0 is torch.float64 on cpu but the module computes in torch.float32"):
        run_parallel(module, x, tuple(torch.zeros(1, 2, 5, dtype=torch.float64) for _ in range(2)))
    same = torch.randn(100, 2, 3)
    for out in (same, same[:], same.detach(), same.numpy()):
        with one_sentence("out lies in the memory of x"):
            run_parallel(nn.LSTM(3, 3), same, out=out)
    with one_sentence("cannot be written to as >f4"):
        run_parallel(nn.LSTM(3, 3), same, out=np.empty((100, 2, 3), ">f4"))
    with one_sentence("x is torch.int64 but"):
        run_parallel(module, x.long())
    with one_sentence("chunks is True"):
        run_parallel(module, x, chunks=True)
    assert run_parallel(module, x, chunks=np.int64(2), warmup=np.int32(45))[2].chunks == 2


def test_missing_values_late_in_an_array_are_seen_where_the_module_runs_by_itself(monkeypatch):
    monkeypatch.setattr("unrecurrent.parallel._SPAN_BYTES", 100_000)
    x = np.random.default_rng(0).normal(size=(12_000, 1, 3)).astype(np.float32)
    x[11_000] = np.nan
    with one_sentence("NaN"):
        run_parallel(chaotic(nn.LSTM), x)


def test_a_module_may_call_a_layer_dropout():
    class Regularised(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.dropout = nn.LSTM(3, 5), nn.Dropout(0.0)

        def forward(self, x, hx=None):
            y, state = self.lstm(x, hx)
            return self.dropout(y), state

    module, x = Regularised(), torch.randn(300, 1, 3)
    assert_same(run_parallel(module, x, chunks=3, warmup=45)[:2], module(x), 1e-4)


def test_gradients_of_parametrized_weights_are_not_lost():
    """Computed weights are no parameters of the module that runs one direction."""
    module, x = nn.GRU(3, 8, bidirectional=True, bias=False), torch.randn(400, 1, 3)
    for name in [name for name, _ in module.named_parameters()]:
        nn.utils.parametrizations.spectral_norm(module, name)
    module.eval()
    y, _, evidence = run_parallel(module, x, chunks=4, warmup=60)
    assert (evidence.mode, y.requires_grad) == ("parallel", True)


@pytest.mark.parametrize("steps", [2, 10, 16, 40])
def test_sequences_too_short_for_a_pilot_run_by_themselves(steps):
    module, x = nn.GRU(3, 8), torch.randn(steps, 1, 3)
    assert_same(run_parallel(module, x, chunks=2)[:2], module(x), 1e-4)


def test_missing_values_in_packed_sequences_are_seen():
    for lengths, options in (([400, 1, 1], {"chunks": 8, "warmup": 60}), ([300, 50], {})):
        sequences = [torch.randn(n, 3) for n in lengths]
        sequences[-1][0] = float("nan")
        with one_sentence("NaN"):
            run_parallel(nn.GRU(3, 8), pack_sequence(sequences), **options)


def test_bidirectional_with_a_parametrization():
    module, x = nn.LSTM(3, 5, bidirectional=True), torch.randn(300, 1, 3)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0_reverse")
    assert_same(run_parallel(module, x, chunks=3, warmup=45)[:2], module(x), 1e-4)


def test_module_with_a_start_state_of_its_own_must_be_told():
    class Learned(Leak):
        def forward(self, x, hx=None):
            return super().forward(x, torch.ones(1, x.shape[1], 1) if hx is None else hx)

    x = torch.rand(100, 1, 2)
    with one_sentence("pass its start state"):
        run_parallel(Learned(), x)
    assert_same(run_parallel(Learned(), x, torch.ones(1, 1, 1), chunks=2, warmup=45)[:2], Learned()(x), 1e-4)


# Engines --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 160])
@pytest.mark.parametrize(
    "make",
    [
        lambda h: nn.RNN(3, h, 2),
        lambda h: nn.RNN(3, h, nonlinearity="relu", bias=False),
        lambda h: nn.GRU(3, h, 2),
        lambda h: nn.GRU(3, h, bias=False),
        lambda h: nn.LSTM(3, h, 2),
        lambda h: nn.LSTM(3, h, bias=False),
        lambda h: StableRNN(3, h, 2, rate=0.9),
        lambda h: StableGRU(3, h, rate=0.9),
        lambda h: StableLSTM(3, h, 2, rate=0.9),
        lambda h: StableLSTM(3, h, bias=False, rate=0.9),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_loop_engine_gives_what_the_module_gives(size, make, compiled, monkeypatch):
    module = make(size)
    assert LoopEngine.takes(module, torch.float32)
    if not compiled:
        monkeypatch.setattr(kernels.Recurrence, "takes", lambda dtype: False)
    if not LoopEngine.takes(module, torch.float32):
        assert isinstance(module, nn.LSTM | StableLSTM)  # its plain loop is the module
        return
    x, state = torch.randn(63, 97, 3), parts_of(start(module, 97))
    before = [part.clone() for part in state]
    with torch.no_grad():
        y, new = LoopEngine(module).advance(x, state)
        own, own_new = ModuleEngine(module, x).advance(x, state)
    torch.testing.assert_close(y, own, atol=5e-6, rtol=0)
    for part, own_part in zip(new, own_new, strict=True):
        torch.testing.assert_close(part, own_part, atol=5e-6, rtol=0)
    assert all(map(torch.equal, state, before)), "the start state was written to"


@pytest.mark.skipif(not kernels.Recurrence.takes(torch.float32), reason="needs a C compiler")
@pytest.mark.parametrize("kind", [*KINDS, StableLSTM])
@pytest.mark.parametrize("rows", [1, 2, 7, 13, 600])
@torch.no_grad()
def test_compiled_recurrence_reads_and_writes_rows_wherever_they_lie(kind, rows):
    """The same numbers bit for bit, alone or among others, in whatever layout: a chunk does not see its neighbours."""
    engine = LoopEngine(kind(5, 19))
    table, target = torch.randn(rows, 11, 5), torch.full((rows, 14, 19), -7.0)
    state = tuple(torch.randn_like(part) for part in engine.zero_state(rows))
    y, new = engine.advance(table.transpose(0, 1).contiguous(), state)
    out = target[:, 2:13].transpose(0, 1)
    again, new_again = engine.advance(table.transpose(0, 1), state, out)
    assert again.data_ptr() == out.data_ptr()
    assert torch.equal(target[:, 2:13].transpose(0, 1), y)
    assert (torch.cat([target[:, :2], target[:, 13:]], dim=1) == -7).all(), "it wrote beside its rows"
    one, _ = engine.advance(table[-1:].transpose(0, 1), tuple(part[:, -1:] for part in state))
    assert torch.equal(one[:, 0], y[:, -1])
    upside_down = engine.advance(torch.stack([*table.unbind(2)]).permute(2, 1, 0), state)[0]
    assert torch.equal(upside_down, y)
    assert all(map(torch.equal, new, new_again))


@pytest.mark.skipif(not kernels.Recurrence.takes(torch.float32), reason="needs a C compiler")
@pytest.mark.parametrize("kind", [*KINDS, partial(nn.RNN, nonlinearity="relu"), StableLSTM])
@torch.no_grad()
def test_compiled_recurrence_keeps_what_is_not_a_number_and_bears_what_is_large(kind):
    module = kind(3, 20)
    x = torch.randn(9, 4, 3)
    x[2, 1, 0], x[4, 2] = torch.nan, 1e30
    engine = LoopEngine(module)
    y, _ = engine.advance(x, engine.zero_state(4))
    own, _ = module(x)
    torch.testing.assert_close(y, own, atol=5e-6, rtol=1e-5, equal_nan=True)


@pytest.mark.skipif(not kernels.Recurrence.takes(torch.float32), reason="needs a C compiler")
@torch.no_grad()
def test_compiled_recurrence_reads_what_is_negated_when_it_is_read_and_nothing_at_all():
    engine, x = LoopEngine(nn.GRU(4, 8)), torch.randn(9, 3, 4)
    y, _ = engine.advance(-x, engine.zero_state(3))
    assert torch.equal(engine.advance(torch._neg_view(x), engine.zero_state(3))[0], y)
    assert engine.advance(x[:, :0], engine.zero_state(0))[0].shape == (9, 0, 8)


class Doubled(StableLSTM):
    def _run(self, x, h, c):
        y, h, c = super()._run(x, h, c)
        return 2 * y, h, c


class CalledTwice(nn.LSTM):
    def __call__(self, *args):
        y, state = super().__call__(*args)
        return 2 * y, state


class Named(nn.GRU):
    """What it is called and how it is made change nothing about it."""

    note = "mine"

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = 3

    def extra_repr(self):
        return f"{super().extra_repr()}, {self.extra}"


def halved(module):
    run = module._run
    module._run = lambda x, h, c: (run(x, h, c)[0] / 2, h, c)
    return module


@pytest.mark.parametrize("make", [Doubled, CalledTwice, lambda *sizes: halved(StableLSTM(*sizes))])
@torch.no_grad()
def test_a_layer_with_methods_of_its_own_is_taken_as_the_users_module(make):
    module, x = make(4, 8), torch.randn(600, 1, 4)
    assert not is_stock(module)
    y, _, _ = run_parallel(module, x, chunks=8, warmup=60)
    assert (y - module(x)[0]).abs().max() <= 1e-4
    assert is_stock(Named(4, 8))
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_stock(nn.LSTM(4, 8))
    hook.remove()


class Centred(nn.Module):
    """What it makes of a sequence depends on the others in its batch."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 16)

    def forward(self, x, h=None):
        y, h = self.rnn(x, h)
        return y - y.mean(1, keepdim=True), h


@torch.no_grad()
def test_a_module_that_looks_at_its_whole_batch_runs_step_by_step():
    module, x = Centred(), torch.randn(4096, 4, 3) + torch.randn(1, 4, 1)
    y, _, evidence = run_parallel(module, x, chunks=8, warmup=80)
    assert "other sequences in its batch" in evidence.fallback
    assert torch.equal(y, module(x)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sums_of_large_inputs_that_nearly_cancel_round_more_than_tol(kind):
    module, x = kind(2, 16), torch.randn(2048, 1, 2)
    module.weight_ih_l0[:, 1] = -module.weight_ih_l0[:, 0]
    x += 1e5
    y, _, evidence = run_parallel(module, x, chunks=8, warmup=200)
    assert evidence.mode == "sequential"
    assert "rounding" in evidence.fallback
    assert torch.equal(y, module(x)[0])
    assert run_parallel(module, x - 1e5, chunks=8, warmup=200)[2].mode == "parallel"


@torch.no_grad()
def test_a_start_state_that_leaves_no_room_for_rounding_is_mended():
    module, x = nn.GRU(3, 32), torch.randn(4096, 1, 3)
    for warmup in range(18, 30):
        evidence = run_parallel(module, x, chunks=16, warmup=warmup, tol=5e-6)[2]
        assert evidence.mode == "parallel", (warmup, evidence.fallback)


def test_dropout_between_layers_runs_the_module_while_it_trains():
    fast, x = Parallel(nn.LSTM(3, 16, num_layers=2, dropout=0.3), chunks=4, warmup=40), torch.randn(400, 2, 3)
    y, _ = fast.train()(x)
    assert fast.evidence.mode == "sequential"
    assert "dropout" in fast.evidence.fallback
    assert fast.evidence.steps == 800
    y.sum().backward()
    assert fast.module.weight_hh_l0.grad is not None
    with torch.no_grad():
        fast.eval()(x)
        assert fast.evidence.mode == "parallel"
        single = nn.LSTM(3, 16).train()
        single.dropout = 0.3  # of one layer: there is nothing between
        assert run_parallel(single, x, chunks=4, warmup=40)[2].mode == "parallel"


@torch.no_grad()
def test_layers_that_only_look_different_take_the_loop():
    lstm = nn.utils.parametrizations.weight_norm(nn.LSTM(3, 8), "weight_hh_l0")
    x = torch.randn(64, 5, 3)
    for module in (lstm, Named(3, 8)):
        assert LoopEngine.takes(module, torch.float64 if isinstance(module, nn.GRU) else torch.float32) or not (
            kernels.Recurrence.takes(torch.float32)
        )
    if kernels.Recurrence.takes(torch.float32):
        engine = LoopEngine(lstm)
        assert (engine.advance(x, engine.zero_state(5))[0] - lstm(x)[0]).abs().max() < 5e-6
    named = Named(3, 8)
    named.__dict__["_compiled_call_impl"] = named._call_impl  # what compile() leaves behind
    assert is_stock(named)


@pytest.mark.parametrize("kind", [StableRNN, StableGRU, StableLSTM])
@torch.no_grad()
def test_a_stable_layer_whose_weights_were_written_to_is_held_first(kind):
    module = kind(3, 8, rate=0.9)
    module.weight_hh_l0.copy_(torch.randn_like(module.weight_hh_l0) * 9)
    x = torch.rand(4_000, 1, 3)
    y, _, evidence = run_parallel(module, x, chunks=10, warmup=300)
    assert evidence.mode == "parallel"
    assert (y - module(x)[0]).abs().max() <= 1e-4


def test_what_the_modules_own_runs_took_is_remembered():
    module, x = nn.RNN(3, 5), torch.randn(2_000, 1, 3)
    plain = ModuleEngine(module, x)
    forget_costs()
    part = min(sequential_step(plain, x) for _ in range(3))
    learn_sequential_step(plain, x[:1], len(x), 1.5 * part * len(x))
    assert sequential_step(plain, x) == part, "one run may have been disturbed"
    learn_sequential_step(plain, x[:1], len(x), 7.0)
    assert sequential_step(plain, x) == pytest.approx(1.5 * part)
    assert sequential_step(plain, x[:500]) == part
    forget_costs()
    for _ in range(2):
        learn_sequential_step(plain, x[:1], len(x), 7.0)
    assert sequential_step(plain, x) < 0.1
    forget_costs()


def rare_chaos(seed):
    """An RNN that forgets at once where x is 1 and is chaotic where it is 0: a saturated unit stands in between."""
    torch.manual_seed(seed)
    module = nn.RNN(1, 32).requires_grad_(False)
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        getattr(module, name).zero_()
    w = module.weight_hh_l0.copy_(torch.randn(32, 32) * 2.5 / 32**0.5)
    w[0], w[:, 0] = 0, torch.where(torch.rand(32) < 0.5, -40.0, 40.0)
    w[0, 0], module.weight_ih_l0[0], module.bias_ih_l0[0] = 0, 100, -50
    module.bias_hh_l0[1:] = w[1:, 0]
    return module


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("seed", [0, 2])
@torch.no_grad()
def test_rare_chaos_that_the_inputs_do_not_reach_is_seen(seed, gradients):
    module, begin = rare_chaos(seed), 3_000 + 137 * seed
    x = 1 + 0.01 * torch.randn(8_192, 1, 1)
    x[begin : begin + 90] -= 1
    with torch.set_grad_enabled(gradients):
        y, state, evidence = run_parallel(module.requires_grad_(gradients), x, chunks=16, warmup=32, verify="outputs")
    assert evidence.mode == "sequential"
    assert_same((y, state), module(x), 0.0)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_under_autocast_the_module_runs(kind):
    module, x = kind(8, 32), torch.randn(2_000, 1, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, state, evidence = run_parallel(module, x, chunks=8, warmup=64)
        assert evidence.mode == "sequential"
        assert_same((y, state), module(x), 0.0)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_forward_mode_tangents_are_those_of_the_module(kind):
    module, x = kind(3, 8).requires_grad_(False), torch.randn(400, 1, 3)
    _prepare_forward_mode()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        y, _, evidence = run_parallel(module, dual, chunks=4, warmup=60)
        own, _ = module(dual)
        tangents = [forward_ad.unpack_dual(part).tangent for part in (y, own)]
    assert evidence.mode == "parallel"
    torch.testing.assert_close(*tangents, atol=1e-5, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cuda_device(kind):
    module, x = kind(3, 32).cuda(), torch.randn(5000, 1, 3, device="cuda")
    with torch.no_grad():
        assert_same(run_parallel(module, x)[:2], module(x), 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Found by a review: each was broken once


def test_a_certificate_of_other_weights_is_refused():
    layer = torch.nn.RNN(3, 8)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(0.5)
    certificate = certify(layer)
    x = torch.randn(300, 1, 3)
    run_parallel(layer, x, chunks=4, warmup=30, certificate=certificate)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(1.5)
    with pytest.raises(InputError, match="about other weights"):
        run_parallel(layer, x, chunks=4, warmup=30, certificate=certificate)


def test_unbatched_input_with_a_start_state_falls_back():
    layer = torch.nn.LSTM(3, 8)
    x, h0 = torch.randn(50, 3), (torch.randn(1, 8), torch.randn(1, 8))
    y, state, evidence = run_parallel(layer, x, h0)
    expected, expected_state = layer(x, h0)
    assert evidence.mode == "sequential"
    assert torch.equal(y, expected)
    assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True))


@pytest.mark.parametrize("out", [torch.empty(300, 1, 8, dtype=torch.int32), [0.0]], ids=["integers", "a list"])
def test_unusable_out_is_one_sentence(out):
    with pytest.raises(InputError, match="out "):
        run_parallel(torch.nn.RNN(3, 8), torch.randn(300, 1, 3), out=out)


@pytest.mark.parametrize("chunks", ["auto", 2, 3, 7, 16])  # of two or three, the stretch lies in the first
@pytest.mark.parametrize("gradients", [False, True])
def test_rounding_that_grows_in_a_rare_stretch_is_seen_on_all_outputs(chunks, gradients):
    """The state forgets at once while the input saturates it; in one stretch of silence rounding grows to order 1."""
    torch.manual_seed(1)
    layer = nn.RNN(3, 32)
    with torch.no_grad():
        layer.weight_hh_l0.normal_(0, 4 / 32**0.5)
        layer.weight_ih_l0.normal_()
        layer.weight_ih_l0[:, 2] = 20 * layer.weight_ih_l0[:, 2].sign()
    x = torch.randn(16_384, 1, 3) * 0.5
    x[..., 2] = 1 + 0.1 * torch.randn(16_384, 1)
    x[5000:5040, :, 2] = 0
    with torch.set_grad_enabled(gradients):
        y, _, evidence = run_parallel(layer, x, chunks=chunks, warmup=60, verify="outputs")
        assert evidence.mode == "sequential"
        assert torch.equal(y, layer(x)[0])


def test_a_module_whose_state_does_not_carry_all_runs_by_itself():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 8)

        def forward(self, x, hx=None):
            return self.gru(x + torch.arange(len(x)).view(-1, 1, 1) / 16, hx)

    module, x = Position(), torch.randn(2_000, 1, 3)
    with torch.no_grad():
        y, _, evidence = run_parallel(module, x, chunks=8, warmup=50)
        assert "does not carry" in evidence.fallback
        assert torch.equal(y, module(x)[0])


class Accumulator(nn.Module):
    """h ← keep h + u: what it was given at first it remembers for ever, or for long."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x, hx=None):
        h = x.new_zeros(1, x.shape[1], x.shape[2]) if hx is None else hx
        states = []
        for step in x:
            h = self.keep * h + step
            states.append(h[0])
        return torch.stack(states), h


def scaled(module, factor):
    with torch.no_grad():
        for weight in module.parameters():
            weight *= factor
    return module


@pytest.mark.parametrize("verify", ["pilot", "outputs"])
@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("tol", [1e-4, 1e-2])
@pytest.mark.parametrize(("kind", "size"), [(nn.RNN, 64), (nn.GRU, 256)])
def test_few_chunks_of_a_chaotic_module_are_not_taken_for_its_run(kind, size, tol, chunks, verify):
    """After as many sweeps as there are boundaries all mismatches are 0, though rounding has grown to everything."""
    torch.manual_seed(0)
    module = scaled(kind(8, size), 5)
    x = 0.3 * torch.randn(400, 1, 8)
    assert_fell_back(module, x, None, tol=tol, chunks=chunks, warmup=10, verify=verify)


@pytest.mark.parametrize("keep", [1.0, 0.9999])
@pytest.mark.parametrize("warmup", [10, 1500])
def test_rounding_of_an_accumulator_is_seen_whatever_the_warmup(keep, warmup):
    assert_fell_back(Accumulator(keep), torch.rand(4000, 1, 4), None, chunks=2, warmup=warmup)


def test_rounding_is_seen_beside_a_certificate_too():
    module = nn.RNN(4, 4, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.99 * torch.eye(4))
        module.weight_ih_l0.copy_(100 * torch.eye(4))
    x = torch.rand(4000, 1, 4)
    certificate = certify(module, inputs=x)
    assert certificate.stable
    assert_fell_back(module, x, None, chunks=2, warmup=1900, certificate=certificate)


class Louder(nn.GRU):
    def forward(self, x, hx=None):
        y, h = super().forward(x, hx)
        return 100 * y, h


def hooked():
    module = nn.GRU(3, 8)
    module.register_forward_hook(lambda module, given, answer: (100 * answer[0], answer[1]))
    return module


@pytest.mark.parametrize("make", [lambda: Louder(3, 8), hooked], ids=["subclass", "hook"])
def test_a_certificate_says_nothing_of_a_forward_of_ones_own(make):
    torch.manual_seed(0)
    module, plain, x = scaled(make(), 0.3), nn.GRU(3, 8), torch.rand(600, 1, 3)
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        y, _, evidence = run_parallel(module, x, chunks=8, warmup=5, tol=1e-2, certificate=certify(plain, inputs=x))
        assert float((y - module(x)[0]).abs().max()) <= 1e-2
    assert evidence.bound is None
    assert "not as this module does" in evidence.note


def test_a_bidirectional_module_with_hooks_runs_as_it_is():
    module = nn.GRU(3, 8, bidirectional=True)
    module.register_forward_hook(lambda module, given, answer: (2 * answer[0], answer[1]))
    assert_fell_back(module, torch.randn(400, 1, 3), None, chunks=4, warmup=60)


def test_a_subclass_with_a_forward_of_its_own_is_tried_first():
    class Sum(nn.LSTM):
        def forward(self, x, hx=None):
            y, state = super().forward(x, hx)
            return y.cumsum(0), state

    assert_fell_back(Sum(3, 8), torch.rand(400, 1, 3), None, chunks=4, warmup=60)


@pytest.mark.parametrize("verify", ["pilot", "outputs"])
def test_a_start_state_that_is_uncertain_and_matters_late_is_seen(verify, monkeypatch):
    """The last chunk of one span holds its state, and the outputs look at it early in the next."""

    monkeypatch.setattr("unrecurrent.parallel._SPAN_BYTES", 1)
    module, x = LooksLate(), late_inputs(4_096, 2_048)
    y, _, evidence = run_parallel(module, x.numpy(), chunks=8, warmup=80, tol=1e-2, verify=verify)
    assert float((torch.as_tensor(y) - module(x)[0]).abs().max()) <= 1e-2, evidence


def test_a_compiled_model_runs_its_parallel_part_as_it_is():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrence = Parallel(nn.GRU(3, 8), chunks=4, warmup=60)
            self.readout = nn.Linear(8, 2)

        def forward(self, x):
            return self.readout(self.recurrence(x)[0].relu())

    model = Model()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            x = torch.randn(400, 1, 3)
            assert torch.equal(compiled(x), model(x))
            assert model.recurrence.evidence.mode == "parallel"
    torch._dynamo.reset()


def test_a_blind_direction_of_change_does_not_hide_a_gain():
    """The outputs see the difference of two units, which some ± directions of change leave as it is."""

    class Difference(nn.Module):
        def forward(self, x, hx=None):
            h = x.new_zeros(1, x.shape[1], 2) if hx is None else hx
            outputs = []
            for step in x:
                h = 0.9 * h + step[:, :2]
                outputs.append(step[:, 2:] * (h[0, :, :1] - h[0, :, 1:]))
            return torch.stack(outputs), h

    x = torch.rand(800, 1, 3, dtype=torch.float64)
    x[..., 2] = 0
    x[50::100, :, 2] = 1000
    y, _, evidence = run_parallel(Difference(), x, chunks=8, warmup=80, tol=1e-2, verify="outputs")
    assert float((y - Difference()(x)[0]).abs().max()) <= 1e-2
    assert evidence.gain > 5


def test_out_of_a_module_whose_outputs_are_not_its_state(monkeypatch):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.GRU(3, 8), nn.Linear(8, 5)

        def forward(self, x, hx=None):
            y, h = self.body(x, hx)
            return self.head(y), h

    module, x, out = Head(), torch.randn(300, 2, 3), torch.zeros(300, 2, 5)
    with torch.no_grad():
        run_parallel(module, x, chunks=4, warmup=60, out=out)
        torch.testing.assert_close(out, module(x)[0], atol=1e-4, rtol=0)


def test_short_sequences_are_not_probed():
    steps = []

    class Counting(nn.GRU):
        def forward(self, x, hx=None):
            steps.append(len(x))
            return super().forward(x, hx)

    run_parallel(Counting(3, 8), torch.randn(63, 1, 3))
    assert sum(steps) <= 66


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: run_parallel(nn.Linear(3, 3), torch.randn(8, 1, 3)), "must take"),
        (lambda: run_parallel("lstm", torch.randn(8, 1, 3)), "nn.Module"),
        (lambda: run_parallel(nn.GRU(3, 8), [[1.0]]), "x must be"),
        (lambda: run_parallel(nn.GRU(3, 8), torch.randn(8, 1, 3), tol="small"), "tol is"),
        (lambda: run_parallel(nn.GRU(3, 8), torch.randn(8, 1, 3), certificate="yes"), "certificate must"),
        (lambda: run_parallel(nn.GRU(3, 8), torch.randn(8, 1, 3), (torch.zeros(1, 1, 8),)), "one tensor"),
        (lambda: run_parallel(type("Own", (nn.GRUCell,), {})(3, 8), torch.randn(8, 1, 3)), "not a plain"),
        (
            lambda: run_parallel(
                nn.GRU(3, 8),
                pack_padded_sequence(torch.randn(8, 2, 3), [8, 4]),
                torch.zeros(1, 5, 8),
            ),
            "one start state for each",
        ),
    ],
)
def test_what_cannot_be_run_gets_one_sentence(call, words):
    with one_sentence(words):
        call()


def test_a_module_that_takes_no_larger_batch_runs_by_itself():
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.GRU(3, 8)

        def forward(self, x, hx=None):
            if x.shape[1] != 1:
                raise RuntimeError("one sequence only")
            return self.body(x, hx)

    assert_fell_back(Single(), torch.randn(400, 1, 3), None, chunks=4, warmup=60)


def test_parallel_stands_in_for_the_layer():
    layer = nn.LSTM(3, 8, batch_first=True)
    x = torch.randn(1, 400, 3)
    fast = Parallel(layer, chunks=4, warmup=60, certificate=certify(layer))
    assert (fast.hidden_size, fast.batch_first) == (8, True)
    with torch.no_grad():
        layer.weight_ih_l0 += 0.01
        y, _ = fast(input=x)
        torch.testing.assert_close(y, layer(x)[0], atol=1e-4, rtol=0)
    assert "no longer" in fast.evidence.note
    assert not hasattr(fast, "nonsense")


def test_a_cost_that_spoke_against_a_parallel_run_is_measured_again(monkeypatch):
    module, x = nn.RNN(3, 5), torch.randn(65_536, 1, 3)
    forget_costs()
    own = min(sequential_step(ModuleEngine(module, x), x) for _ in range(2))
    monkeypatch.setattr(engines, "_batched_step", lambda engine, x, rows: 0.6 * own * rows)  # a machine that was busy
    for _ in range(2):
        assert run_parallel(module, x, warmup=20)[2].mode == "sequential"
    monkeypatch.setattr(engines, "_batched_step", lambda engine, x, rows: 1e-9)
    assert run_parallel(module, x, warmup=20)[2].mode == "parallel"
    forget_costs()
