"""`StableLSTM`: the fast path against its plain reference, the call of `nn.LSTM`, and the rate, whoever trains it."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from unrecurrent import kernels, onednn, stable_lstm
from unrecurrent.certificate import certify
from unrecurrent.errors import InputError
from unrecurrent.stable_lstm import StableLSTM, _loop, _Recurrence, reference


def arguments(steps, batch, width, size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    ceiling = torch.linspace(0.5, 0.99, size, dtype=dtype)
    weights = (draw(3 * size, width), draw(3 * size, size), draw(3 * size))
    return (draw(steps, batch, width), *weights, ceiling, draw(batch, size), draw(batch, size))


def results(run, given):
    y, c = run(*given)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [t for t in given if t is not None and t.requires_grad]
    return [y, c, *torch.autograd.grad((y * weights).sum() + (c * c).sum(), wanted)]


@pytest.mark.parametrize("dims", [(63, 3, 7, 5), (1, 1, 1, 1), (4, 2, 9, 33)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
def test_fast_path_agrees_with_reference(dims, dtype, tolerance):
    given = arguments(*dims, dtype)
    for fast, plain in zip(results(_Recurrence.apply, given), results(reference, given), strict=True):
        torch.testing.assert_close(fast, plain, atol=tolerance * dims[0], rtol=tolerance)


@pytest.mark.skipif(kernels.library(kernels.GATES) is None, reason="needs a C compiler")
@pytest.mark.parametrize("dims", [(63, 3, 7, 5), (4, 2, 9, 33)])
def test_compiled_gates_agree_with_plain_ones(monkeypatch, dims):
    given = arguments(*dims)
    compiled = results(_Recurrence.apply, given)
    monkeypatch.setattr(kernels, "library", lambda *name: None)
    for fast, plain in zip(compiled, results(_Recurrence.apply, given), strict=True):
        torch.testing.assert_close(fast, plain, atol=3e-5 * dims[0], rtol=3e-5)
        assert not torch.equal(fast, plain) or fast.numel() < 40  # both were run, and round differently


@pytest.mark.skipif(kernels.library(kernels.GATES) is None, reason="needs a C compiler")
def test_compiled_gates_are_right_to_the_last_digits_at_any_size():
    x = torch.cat([sign * torch.logspace(-38, 3, 997) for sign in (1, -1)] + [torch.tensor([0.0, -0.0])])
    raw, ceiling = x.repeat(3)[None], torch.full_like(x, 0.97)
    gates, (squashed, output, cell) = torch.empty_like(raw), torch.empty(3, 1, len(x))
    compiled = kernels.gates(cell)
    kernels.call_gated(compiled.gates, cell, raw, ceiling, torch.zeros_like(cell), gates, squashed, output, cell)
    f, z, o = gates[0].double().chunk(3)
    exact = x.double()
    torch.testing.assert_close(f, ceiling.double() * torch.sigmoid(exact), rtol=3e-7, atol=1e-37)
    torch.testing.assert_close(z, torch.tanh(exact), rtol=3e-7, atol=0)
    torch.testing.assert_close(o, torch.sigmoid(exact), rtol=3e-7, atol=1e-37)


needs_loop = pytest.mark.skipif(kernels.library(kernels.RECURRENCE) is None, reason="needs a C compiler")


@pytest.fixture
def looped(monkeypatch):
    """What `_loop` was called with, call by call."""
    calls = []

    def counted(*given):
        calls.append(given)
        return _loop(*given)

    monkeypatch.setattr(stable_lstm, "_loop", counted)
    return calls


@needs_loop
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 33])
@pytest.mark.parametrize(("inputs", "size"), [(1, 1), (5, 3), (3, 33), (40, 70), (70, 20)])
def test_without_gradients_the_loop_agrees_with_the_reference(looped, inputs, size, rows, bias):
    layer = StableLSTM(inputs, size, num_layers=2, batch_first=True, bias=bias)
    x, (h, c) = torch.randn(rows, 41, inputs), torch.randn(2, 2, rows, size)
    with torch.no_grad():
        y, (h_last, c_last) = layer(x, (h, c))
    assert len(looped) == 2
    y_plain, h_plain = x.transpose(0, 1), []
    for k in range(2):
        y_plain, c_plain = reference(y_plain, *layer._weights(k), h[k], c[k])
        h_plain.append(y_plain[-1])
        torch.testing.assert_close(c_last[k], c_plain.detach(), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(y, y_plain.transpose(0, 1).detach(), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(h_last, torch.stack(h_plain).detach(), atol=3e-6, rtol=1e-5)


@needs_loop
def test_the_loop_is_left_to_calls_it_suits(looped):
    layer, x = StableLSTM(3, 4), torch.randn(40, 2, 3)
    layer(x)
    assert not looped  # the weights want gradients
    with torch.no_grad():
        layer(x)
        assert len(looped) == 1
        StableLSTM(3, 200)(x[:1])  # the layout would cost more than the step
        copy.deepcopy(layer).double()(x.double())
    layer.requires_grad_(False)
    assert layer(x.clone().requires_grad_())[0].requires_grad
    assert len(looped) == 1
    assert not layer(x)[0].requires_grad
    assert len(looped) == 2


class LowRank(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight):
        return weight + self.a @ self.b


def test_an_adapter_of_a_frozen_weight_learns(looped):
    layer = StableLSTM(5, 16).requires_grad_(False)
    adapter = LowRank(48, 5)
    nn.utils.parametrize.register_parametrization(layer, "weight_ih_l0", adapter)
    layer.parametrizations.weight_ih_l0.original.requires_grad_(False)
    layer(torch.randn(40, 3, 5))[0].sum().backward()
    assert adapter.a.grad.abs().sum() > 0
    assert not looped


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "shape"), [("weight_ih", (48, 8)), ("weight_hh", (32, 16)), ("forget_ceiling", (1,))])
def test_weights_of_another_shape_are_refused(name, shape, bias):
    layer = StableLSTM(5, 16, bias=bias)
    with pytest.raises(InputError, match="they must be"):
        torch.func.functional_call(layer, {f"{name}_l0": torch.ones(shape)}, (torch.randn(40, 9, 5),))


def test_a_mode_that_looks_at_operations_sees_them():
    layer, x = StableLSTM(5, 16).requires_grad_(False), torch.randn(40, 8, 5)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 40 * 8 * 48 * (5 + 16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(x)[0].shape == (40, 8, 16)


@needs_loop
def test_the_loop_reads_what_is_negated_and_keeps_what_is_missing():
    layer = StableLSTM(3, 4).requires_grad_(False)
    x, (h, c) = torch.randn(40, 1, 3), torch.randn(2, 1, 1, 4)
    negated = tuple(torch._neg_view(part) for part in (h, c))
    for one, other in zip(layer(torch._neg_view(x), negated), layer(-x, (-h, -c)), strict=True):
        torch.testing.assert_close(one, other)
    x[20] = torch.nan
    y, _ = layer(x)
    assert bool(y[:20].isfinite().all())
    assert bool(y[20:].isnan().all())


def test_missing_numbers_stay_missing():
    layer = StableLSTM(2, 9)
    x = torch.randn(4, 1, 2)
    x[2] = torch.nan
    y, _ = layer(x)
    assert torch.isfinite(y[:2]).all()
    assert y[2:].isnan().all()


def test_fast_path_without_onednn_and_without_bias(monkeypatch):
    monkeypatch.setattr(onednn, "has_onednn", lambda x: False)
    given = list(arguments(63, 3, 7, 5))
    given[3] = None
    for fast, plain in zip(results(_Recurrence.apply, given), results(reference, given), strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-3, rtol=1e-4)


def test_first_and_second_derivatives():
    given = arguments(3, 2, 4, 5, torch.float64)
    assert torch.autograd.gradcheck(_Recurrence.apply, given)
    assert torch.autograd.gradgradcheck(_Recurrence.apply, given)


def test_gradients_that_are_not_wanted_are_left_out():
    layer = StableLSTM(3, 5)
    layer.weight_ih_l0.requires_grad_(False)
    layer(torch.randn(4, 2, 3))[0].sum().backward()
    assert layer.weight_ih_l0.grad is None
    assert layer.weight_hh_l0.grad is not None


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func's own
def test_function_transforms_see_the_plain_path():
    layer = StableLSTM(3, 5)
    x = torch.randn(4, 1, 3)
    jacobian = torch.func.jacrev(lambda x: layer(x)[0])(x)
    _, tangent = torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(jacobian.sum((-1, -2, -3)), tangent)


def trained(layer, optimizer, steps=20):
    target = torch.randn(6, 4, layer.hidden_size)
    for _ in range(steps):
        optimizer.zero_grad()
        ((layer(torch.randn(6, 4, layer.input_size))[0] - 3 * target) ** 2).mean().backward()
        optimizer.step()
    return layer


# ---------------------------------------------------------------------------------------------------------------------
# The call of nn.LSTM


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_shapes_are_those_of_lstm(shape, batch_first):
    x = torch.randn(shape)
    ours, theirs = (cls(3, 5, 2, batch_first=batch_first)(x) for cls in (StableLSTM, nn.LSTM))
    assert ours[0].shape == theirs[0].shape
    assert [part.shape for part in ours[1]] == [part.shape for part in theirs[1]]


def test_time_runs_along_the_dimension_that_batch_first_says():
    layer = StableLSTM(3, 5)
    first = StableLSTM(3, 5, batch_first=True)
    first.load_state_dict(layer.state_dict())
    x = torch.randn(6, 4, 3)
    torch.testing.assert_close(layer(x)[0], first(x.transpose(0, 1))[0].transpose(0, 1))
    assert not torch.equal(layer(x)[0], first(x)[0])


def test_state_carries_over():
    layer = StableLSTM(3, 5, 2)
    x = torch.randn(7, 4, 3)
    y, (h, c) = layer(x)
    first, state = layer(x[:3])
    second, (h2, c2) = layer(x[3:], state)
    torch.testing.assert_close(torch.cat((first, second)), y)
    torch.testing.assert_close((h2, c2), (h, c))


def test_packed_sequences_are_run_one_by_one():
    layer = StableLSTM(3, 5, 2)
    lengths = [4, 7, 1, 7]
    x, start = torch.randn(7, 4, 3), (torch.randn(2, 4, 5), torch.rand(2, 4, 5))
    packed, (h, c) = layer(pack_padded_sequence(x, lengths, enforce_sorted=False), start)
    y = pad_packed_sequence(packed)[0]
    for j, length in enumerate(lengths):
        alone, (h_alone, c_alone) = layer(x[:length, j], (start[0][:, j], start[1][:, j]))
        torch.testing.assert_close(y[:length, j], alone)
        torch.testing.assert_close((h[:, j], c[:, j]), (h_alone, c_alone))


def test_dropout_only_between_layers_and_only_in_training():
    x = torch.randn(6, 4, 3)
    layer = StableLSTM(3, 5, 2, dropout=1.0)
    zero_below = layer(x)[0]
    assert torch.allclose(zero_below, layer(2 * x)[0])
    layer.eval()
    assert not torch.allclose(layer(x)[0], zero_below)
    single = StableLSTM(3, 5, 1, dropout=0.5)
    assert torch.equal(single(x)[0], single(x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The rate


@pytest.mark.parametrize("rate", [0.3, 0.9, 0.98, 0.999])
def test_rate_holds_before_and_after_every_step(rate):
    torch.manual_seed(1)
    layer = StableLSTM(3, 16, 2, rate=rate)
    assert certify(layer).rate <= rate
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    for _ in range(4):
        trained(layer, optimizer, steps=1)
        assert certify(layer).rate <= rate


def test_rate_holds_with_a_compiled_forward_pass():
    layer = StableLSTM(3, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0])
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e3)
    (compiled(x)[0] ** 2).sum().backward()
    optimizer.step()
    assert certify(layer).rate <= 0.98


def test_rate_holds_when_weights_are_written_by_hand():
    layer = StableLSTM(3, 5)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(9.0)
    layer(torch.randn(4, 2, 3))
    assert certify(layer).rate <= 0.98


@pytest.mark.parametrize("look", [StableLSTM.eval, StableLSTM.state_dict])
def test_rate_holds_when_weights_are_evaluated_or_saved(look):
    layer = StableLSTM(3, 5)
    with torch.no_grad():
        layer.weight_hh_l0.fill_(9.0)
    look(layer)
    assert certify(layer).rate <= 0.98


def test_certified_rate_of_the_wide_budgets():
    """The feasible set is the one the joint bounds allow: rows of W_o near 4 and of 2 W_f + W_z near 1 at rate 0.98."""
    torch.manual_seed(0)
    layer = StableLSTM(8, 64)
    with torch.no_grad():
        layer.weight_hh_l0 *= 100
    layer.project()
    f, z, o = layer.weight_hh_l0.detach().abs().sum(1).view(3, 64).mean(1).tolist()
    assert certify(layer).rate <= 0.98
    assert z + 2 * f > 1.0
    assert o > 3.0


def test_rows_within_their_budgets_are_not_touched():
    layer = StableLSTM(3, 5)
    before = layer.weight_hh_l0.detach().clone()
    version = layer.weight_hh_l0._version
    layer.project()
    assert torch.equal(layer.weight_hh_l0, before)
    assert layer.weight_hh_l0._version == version


# ---------------------------------------------------------------------------------------------------------------------
# Copying, saving, exporting


def copies():
    def saved(layer):
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        fresh = StableLSTM(3, 5, 2)
        fresh.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        return fresh

    return [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved]


@pytest.mark.parametrize("make_copy", copies())
def test_copies_train_on_to_the_same_weights_bit_for_bit(make_copy):
    layer = StableLSTM(3, 5, 2)
    trained(layer, torch.optim.SGD(layer.parameters(), lr=1.0))
    twin = make_copy(layer)
    for each in (layer, twin):
        torch.manual_seed(3)
        trained(each, torch.optim.SGD(each.parameters(), lr=1.0))
        assert certify(each).rate <= 0.98
    for name, value in layer.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_the_weight_the_optimizer_moves_is_the_weight_that_is_used():
    layer = StableLSTM(3, 5)
    assert dict(layer.named_parameters()).keys() == dict(nn.LSTM(3, 5).named_parameters()).keys()
    trained(layer, torch.optim.SGD(layer.parameters(), lr=0.5), steps=3)
    x = torch.randn(6, 4, 3)
    weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0 + layer.bias_hh_l0, layer.forget_ceiling_l0)
    expected, _ = reference(x, *weights, torch.zeros(4, 5), torch.zeros(4, 5))
    torch.testing.assert_close(layer(x)[0], expected)


def test_export():
    layer = StableLSTM(3, 5, 2).eval()
    x = torch.randn(6, 4, 3)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_export_of_a_sequence_and_of_one_step(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer = StableLSTM(3, 5).eval()
    state = (torch.randn(1, 4, 5), torch.rand(1, 4, 5))
    for steps in (1, 4):
        x = torch.randn(steps, 4, 3)
        path = tmp_path / f"{steps}.onnx"
        torch.onnx.export(layer, (x, state), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        names = [given.name for given in session.get_inputs()]
        found = session.run(None, dict(zip(names, (t.numpy() for t in (x, *state)), strict=True)))
        y, (h, c) = layer(x, state)
        for ours, theirs in zip((y, h, c), found, strict=True):
            torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, float("nan"), "0.5"])
def test_rate_outside_its_range_is_refused(rate):
    with pytest.raises(InputError, match="rate must be a number between 0 and 1"):
        StableLSTM(3, 5, rate=rate)


@pytest.mark.parametrize("x", [torch.zeros(6, 4, 2), torch.zeros(3), torch.zeros(0, 4, 3)])
def test_inputs_of_the_wrong_shape_are_refused(x):
    with pytest.raises(InputError, match=r"StableLSTM reads \(T, B, 3\)"):
        StableLSTM(3, 5)(x)


def test_states_of_the_wrong_shape_are_refused():
    with pytest.raises(InputError, match=r"h0 and c0 must have shape \(1, 4, 5\)"):
        StableLSTM(3, 5)(torch.zeros(6, 4, 3), (torch.zeros(1, 4, 6), torch.zeros(1, 4, 5)))


SIZES = [{"hidden_size": 0}, {"num_layers": 0}, {"input_size": 2.0}, {"num_layers": True}]


@pytest.mark.parametrize("arguments", [*SIZES, {"dropout": 1.5}, {"dropout": "0.5"}])
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(InputError, match="must be"):
        StableLSTM(**{"input_size": 3, "hidden_size": 5, **arguments})


@pytest.mark.parametrize(("name", "value"), [("bidirectional", True), ("proj_size", 2)])
def test_what_nn_lstm_has_beyond_it_is_refused_in_a_sentence(name, value):
    with pytest.raises(InputError, match=f"leave out {name}"):
        StableLSTM(3, 5, **{name: value})
    assert StableLSTM(3, 5, bidirectional=False, proj_size=0).rate == 0.98


def test_inputs_and_states_of_another_kind_or_dtype_are_refused():
    layer, x, state = StableLSTM(3, 5), torch.zeros(6, 4, 3), (torch.zeros(1, 4, 5), torch.zeros(1, 4, 5))
    for wrong in (x.double(), x.long(), pack_padded_sequence(x.double(), [6, 5, 5, 1])):
        with pytest.raises(InputError, match=r"input is torch\..*, but the layer's weights are torch.float32"):
            layer(wrong)
    with pytest.raises(InputError, match="not list"):
        layer([[0.0, 1.0, 2.0]])
    with pytest.raises(InputError, match=r"c0 is torch\.float64"):
        layer(x, (state[0], state[1].double()))
    for wrong in (state[0], (state[0],), "zeros"):
        with pytest.raises(InputError, match="pair of tensors"):
            layer(x, wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu():
    layer = StableLSTM(3, 5)
    x = torch.randn(6, 4, 3)
    on_gpu = copy.deepcopy(layer).cuda()
    torch.testing.assert_close(on_gpu(x.cuda())[0].cpu(), layer(x)[0], atol=1e-4, rtol=1e-4)


def test_the_rate_is_proved_for_a_wide_layer_close_to_one():
    """The layer brings the norm in which it contracts; without it the search for one ends too early (0.99958)."""
    torch.manual_seed(0)
    lstm = StableLSTM(8, 340, rate=0.9995)
    optimizer = torch.optim.AdamW(lstm.parameters(), lr=6e-3)
    for _ in range(60):
        y, _ = lstm(torch.randn(10, 8, 8))
        optimizer.zero_grad()
        (-3 * y.square().mean()).backward()
        optimizer.step()
    assert certify(lstm).rate <= 0.9995
