import copy
import io

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from unrecurrent.certificate import certify
from unrecurrent.errors import InputError
from unrecurrent.stable_lstm import StableLSTM
from unrecurrent.truncation import truncate, windowed_reference

MAKERS = {
    "rnn": lambda: nn.RNN(3, 5, num_layers=2),
    "relu": lambda: nn.RNN(3, 5, nonlinearity="relu", bias=False),
    "gru": lambda: nn.GRU(3, 5, num_layers=2),
    "lstm": lambda: nn.LSTM(3, 5, num_layers=2),
    "stable-lstm": lambda: StableLSTM(3, 5, num_layers=2),
}
RECURRENT = {"RNN", "LSTM", "GRU", "Loop", "Scan"}


@pytest.fixture(params=MAKERS)
def module(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


@pytest.mark.parametrize("k", [1, 7, 63, 100])
@pytest.mark.parametrize("batch", [1, 2])
def test_is_the_reference_of_one_window_per_output(module, k, batch):
    x = torch.randn(63, batch, 3)
    torch.testing.assert_close(truncate(module, k)(x), windowed_reference(module, x, k), atol=2e-6, rtol=0)


def test_gradients_are_those_of_the_reference(module, monkeypatch):
    module = module.double()
    x = torch.randn(63, 2, 3, dtype=torch.float64, requires_grad=True)
    wrt, weights = [x, *module.parameters()], torch.randn(63, 2, 5, dtype=torch.float64)
    wanted = torch.autograd.grad((windowed_reference(module, x, 7) * weights).sum(), wrt)
    for numbers in (1 << 21, 100):  # one block, and blocks of a few windows that are recomputed
        monkeypatch.setattr("unrecurrent.truncation._BLOCK_NUMBERS", numbers)
        got = torch.autograd.grad((truncate(module, 7)(x) * weights).sum(), wrt)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_depends_on_exactly_the_last_k_inputs(module):
    x = torch.randn(30, 1, 3, requires_grad=True)
    y = truncate(module, 6)(x)
    for t in (0, 3, 5, 6, 20, 29):
        (slope,) = torch.autograd.grad(y[t].sum(), x, retain_graph=True)
        read = slope.abs().sum((1, 2)).nonzero().flatten().tolist()
        assert read == list(range(max(0, t - 5), t + 1))


def test_step_view_gives_the_same_numbers(module):
    feedforward, x = truncate(module, 6), torch.randn(20, 2, 3)
    cache, outputs = feedforward.init_cache(2), []
    for x_t in x:
        y_t, cache = feedforward.step(x_t, cache)
        outputs.append(y_t)
    torch.testing.assert_close(torch.stack(outputs), feedforward(x), atol=2e-6, rtol=0)
    assert feedforward.receptive_field == 6


@pytest.mark.parametrize("piece", [4, 17])  # fewer steps than windows, and more
@pytest.mark.parametrize("k", [6, 63])  # the second reads all of x in one pass
def test_pieces_give_the_same_numbers_and_gradients(module, piece, k):
    module = module.double()
    feedforward, x = truncate(module, k), torch.randn(63, 2, 3, dtype=torch.float64)
    cache, outputs = feedforward.init_cache(2), []
    for part in x.split(piece):
        y, cache = feedforward.advance(part, cache)
        outputs.append(y)
    whole = feedforward(x)
    torch.testing.assert_close(torch.cat(outputs), whole, atol=1e-10, rtol=0)
    wanted = torch.autograd.grad(whole.square().sum(), module.parameters())
    got = torch.autograd.grad(torch.cat(outputs).square().sum(), module.parameters())
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("k", [4, 20])
def test_layouts(k):
    module = nn.GRU(3, 5, batch_first=True)
    x = torch.randn(2, 20, 3)
    y = truncate(module, k)(x)
    assert y.shape == (2, 20, 5)
    torch.testing.assert_close(truncate(module, k)(x[0]), y[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(y.transpose(0, 1), windowed_reference(_time_first(module), x.transpose(0, 1), k))


def _time_first(module):
    twin = copy.deepcopy(module)
    twin.batch_first = False
    return twin


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func's own
@pytest.mark.parametrize("k", [3, 9])  # shorter than the sequences, and longer
def test_transforms_of_functions_do_not_depend_on_the_length(module, k):
    feedforward, x = truncate(module, k), torch.randn(4, 6, 2, 3)
    torch.testing.assert_close(torch.func.vmap(feedforward)(x), torch.stack([feedforward(part) for part in x]))
    jacobian = torch.autograd.functional.jacobian
    slopes = jacobian(feedforward, x[0])
    torch.testing.assert_close(jacobian(feedforward, x[0], vectorize=True), slopes)
    _, forward = torch.func.jvp(feedforward, (x[0],), (x[1],))
    torch.testing.assert_close(forward, torch.einsum("tbhuvw,uvw->tbh", slopes, x[1]), atol=1e-5, rtol=1e-5)
    halved = {name: parameter / 2 for name, parameter in feedforward.named_parameters()}
    wanted = truncate(_halved(module), k)(x[0])
    torch.testing.assert_close(torch.func.functional_call(feedforward, halved, (x[0],)), wanted)


def _halved(module):
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.div_(2)
    return twin


@pytest.mark.parametrize("k", [3, 9])
def test_a_layer_that_keeps_itself_stable_does_so_here_too(k):
    module, x = StableLSTM(3, 5), torch.randn(6, 2, 3)
    with torch.no_grad():
        module.weight_hh_l0.mul_(100)
    feedforward = truncate(copy.deepcopy(module), k)
    torch.testing.assert_close(feedforward(x), windowed_reference(module, x, k), atol=2e-6, rtol=0)


def test_a_hook_that_comes_later_acts_at_no_length():
    module, x = nn.GRU(3, 5), torch.randn(6, 2, 3)
    feedforward = truncate(module, 9)
    before = feedforward(x)
    module.register_forward_hook(lambda module, given, answer: (2 * answer[0], answer[1]))
    torch.testing.assert_close(feedforward(x), before, atol=2e-6, rtol=0)


def test_shares_its_parameters_and_copies_apart():
    module = nn.LSTM(3, 5)
    feedforward, x = truncate(module, 4), torch.randn(10, 1, 3)
    twin, before = copy.deepcopy(feedforward), feedforward(x)
    with torch.no_grad():
        module.weight_hh_l0.mul_(2)
    assert not torch.allclose(feedforward(x), before)
    assert torch.equal(twin(x), before)
    assert feedforward.state_dict().keys() == {f"module.{name}" for name in module.state_dict()}


@pytest.mark.parametrize("make", [lambda: StableLSTM(3, 8, rate=0.8), lambda: nn.RNN(3, 8)])
def test_certified_horizon_is_long_enough(make):
    torch.manual_seed(0)
    module = make().double()
    if isinstance(module, nn.RNN):
        module.weight_hh_l0.data.mul_(0.4)
    x = torch.rand(400, 3, 3, dtype=torch.float64) * 2 - 1
    k = certify(module, input_bound=1.0).horizon(1e-2)
    with torch.no_grad():
        assert (truncate(module, k)(x) - module(x)[0]).abs().max() <= 1e-2
        assert (truncate(module, 1)(x) - module(x)[0]).abs().max() > 1e-2


TIME = {"x": {0: torch.export.Dim("T", min=2)}}


@pytest.mark.parametrize("k", [3, 12])
def test_exports_with_a_dynamic_time_axis(module, k):
    feedforward, other = truncate(module, k).eval(), torch.randn(29, 2, 3)
    program = torch.export.export(feedforward, (torch.randn(11, 2, 3),), dynamic_shapes=TIME)
    torch.testing.assert_close(program.module()(other), feedforward(other), atol=2e-6, rtol=0)


@pytest.mark.filterwarnings("ignore")  # the exporter's own, about its registry and deprecations in its dependencies
@pytest.mark.parametrize("make", [lambda: nn.GRU(3, 5), lambda: nn.LSTM(3, 5, num_layers=2)])
def test_onnx_graph_has_no_recurrent_operator(make):
    feedforward, other, file = truncate(make(), 3).eval(), torch.randn(29, 2, 3), io.BytesIO()
    torch.onnx.export(feedforward, (other[:11],), dynamo=True, dynamic_shapes=TIME, verbose=False).save(file)
    graph = onnx.load_from_string(file.getvalue())
    nodes = [node for part in (graph.graph, *graph.functions) for node in part.node]
    assert not RECURRENT & {node.op_type for node in nodes}
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), feedforward(other).detach(), atol=2e-6, rtol=0)


def test_bad_input_gets_one_sentence():
    with pytest.raises(InputError, match="at least 1"):
        truncate(nn.GRU(3, 5), 0)
    with pytest.raises(InputError, match="bidirectional"):
        truncate(nn.GRU(3, 5, bidirectional=True), 3)
    with pytest.raises(InputError, match="proj_size"):
        truncate(nn.LSTM(3, 5, proj_size=2), 3)
    with pytest.raises(InputError, match="not an"):
        truncate(nn.Linear(3, 5), 3)
    with pytest.raises(InputError, match="eval"):
        truncate(nn.GRU(3, 5, num_layers=2, dropout=0.1), 3)
    with pytest.raises(InputError, match="not empty"):
        truncate(nn.GRU(3, 5), 3)(torch.randn(0, 1, 3))
    with pytest.raises(InputError, match="give"):
        truncate(nn.GRU(3, 5), 3)(torch.randn(5, 1, 4))


def test_a_layer_with_hooks_or_a_forward_of_its_own_is_refused():
    hooked = nn.GRU(3, 5)
    hooked.register_forward_hook(lambda module, given, answer: answer)
    own = type("Own", (nn.GRU,), {"forward": lambda self, x, hx=None: nn.GRU.forward(self, x, hx)})(3, 5)
    for module in (hooked, own):
        with pytest.raises(InputError, match="of its own"):
            truncate(module, 4)
