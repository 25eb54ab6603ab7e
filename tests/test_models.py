"""Every model: both views agree, pieces agree with the whole, and nothing outside the receptive field matters."""

import copy
import pickle

import pytest
import torch

from unrecurrent.certificate import certify
from unrecurrent.errors import InputError
from unrecurrent.models import Interface, build_model, match_parameters, model_names, parameter_count
from unrecurrent.training import TrainingConfig, make_optimizer

#: models of one sequence: those of two have tests of their own
MODELS = [name for name in model_names() if "seq2seq" not in name]
PIANO = Interface(None, 5, 4)
TEXT = Interface(7, None, 7)
SMALL = {
    "window": {"hidden_size": 5, "k": 3},
    "tcn": {"hidden_size": 5, "layers": 2, "kernel_size": 3},
    "gated-conv": {"hidden_size": 5, "layers": 3, "kernel_size": 3},
    "wavenet": {"hidden_size": 5, "layers": 2, "cycles": 2, "kernel_size": 3},
    "transformer": {"hidden_size": 5, "layers": 2, "heads": 3, "head_size": 2, "window": 4},
    "ngram-lstm": {"hidden_size": 5, "layers": 2, "k": 6},
}


def small_model(name, interface, **extra):
    return build_model(name, interface, SMALL.get(name, {"hidden_size": 5, "layers": 2}) | extra).eval()


def sample(interface, batch, steps):
    if interface.vocabulary:
        return torch.randint(interface.vocabulary, (batch, steps))
    return torch.randn(batch, steps, interface.features)


#: recurrent models whose inputs need no bound may read them through a convolution
WITH_FRONT = ("rnn", "lstm", "gru", "stable-rnn", "certified-rnn", "certified-lstm")


def views():
    """Yield the names of models with an interface and settings that change what they read or how they answer."""
    for name in MODELS:
        yield pytest.param(name, PIANO, {}, id=f"{name}-features")
        yield pytest.param(name, TEXT, {}, id=f"{name}-symbols")
        yield pytest.param(name, TEXT, {"tied": True, "embedding_size": 5}, id=f"{name}-tied")
        yield pytest.param(name, TEXT, {"tied": True, "embedding_size": 3}, id=f"{name}-tied-narrower")
    for name in WITH_FRONT:
        yield pytest.param(name, TEXT, {"input_kernel": 3}, id=f"{name}-front")
        yield pytest.param(name, PIANO, {"input_kernel": 2}, id=f"{name}-front-features")
    for interface in (TEXT, PIANO):
        yield pytest.param("rnn", interface, {"projected": True}, id=f"rnn-projected-{interface.outputs}")
    yield pytest.param("stable-rnn", TEXT, {"projected": True, "tied": True, "embedding_size": 3}, id="projected-tied")
    for window in (None, 1, 30):  # 30: longer than a piece of 17, shorter than two
        yield pytest.param("transformer", TEXT, {"window": window}, id=f"transformer-window-{window}")
    yield pytest.param("ngram-lstm", TEXT, {"k": 30}, id="ngram-lstm-30")


@pytest.mark.parametrize(("name", "interface", "extra"), list(views()))
def test_step_and_pieces_agree_with_forward(name, interface, extra):
    model = small_model(name, interface, **extra)
    inputs = sample(interface, 3, 63)
    whole = model(inputs)
    assert whole.shape == (3, 63, interface.outputs)
    cache, outputs = model.init_cache(3), []
    for t in range(63):
        output, cache = model.step(inputs[:, t], cache)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-4, atol=1e-5)
    cache, pieces = model.init_cache(3), []
    for piece in inputs.split(17, dim=1):
        output, cache = model.advance(piece, cache)
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_causal_and_sees_exactly_its_receptive_field(name):
    model = small_model(name, PIANO)
    inputs = torch.randn(1, 40, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(inputs)[0, 30].square().sum(), inputs)
    touched = gradient[0].abs().sum(1).nonzero().flatten()
    assert touched.max() == 30
    if model.receptive_field is not None:
        assert touched.min() > 30 - model.receptive_field
    if not model.recurrent:
        assert touched.min() == 31 - model.receptive_field


@pytest.mark.parametrize("name", MODELS)
def test_cache_stops_growing_so_that_a_step_of_generation_has_constant_cost(name):
    model, sizes = small_model(name, PIANO), []
    cache = model.init_cache(2)
    for piece in torch.randn(3, 2, 21, 5):
        cache = model.advance(piece, cache)[1]
        sizes.append([part.shape for part in cache])
    assert sizes[0] == sizes[1] == sizes[2]


def test_attention_without_a_window_sees_all_that_came_before():
    model = small_model("transformer", PIANO, window=None)
    assert model.receptive_field is None
    inputs = torch.randn(1, 40, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(inputs)[0, 30].square().sum(), inputs)
    assert gradient[0].abs().sum(1).nonzero().flatten().tolist() == list(range(31))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_agree_between_pieces_and_whole(name):
    inputs = torch.randn(2, 13, 5)
    gradients = []
    for split in (13, 4):
        torch.manual_seed(1)
        model = small_model(name, PIANO)
        cache, outputs = model.init_cache(2), []
        for piece in inputs.split(split, dim=1):
            output, cache = model.advance(piece, cache)
            outputs.append(output)
        torch.cat(outputs, 1).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_model_survives_deepcopy_pickle_and_state_dict(name):
    model, loaded = small_model(name, PIANO), small_model(name, PIANO)
    loaded.load_state_dict(model.state_dict())
    inputs = torch.randn(2, 6, 5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(inputs), model(inputs))
        twin.project()
        assert torch.equal(model(inputs), model(inputs))


def test_projecting_a_copy_leaves_the_original_alone():
    model = small_model("stable-rnn", PIANO)
    twin = copy.deepcopy(model)
    before = model.recurrence.weight_hh_l0.clone()
    with torch.no_grad():
        twin.recurrence.weight_hh_l0.mul_(100)
    twin(torch.randn(1, 3, 5))
    assert torch.equal(model.recurrence.weight_hh_l0, before)
    assert torch.linalg.matrix_norm(twin.recurrence.weight_hh_l0, 2) < 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", [20_000, 300_000])
def test_width_meets_the_parameter_budget(name, target):
    settings = {**SMALL.get(name, {}), "hidden_size": 1}
    fitted = match_parameters(name, Interface(None, 88, 88), settings, target)
    count = parameter_count(build_model(name, Interface(None, 88, 88), fitted))
    assert abs(count / target - 1) < 0.05


def test_budget_no_width_can_meet_is_refused():
    with pytest.raises(InputError, match=r"no width of 'lstm' comes within 5\.0%"):
        match_parameters("lstm", Interface(None, 88, 88), {}, 700)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match="did you mean 'gated-conv'"):
        build_model("gated-con", PIANO, {})
    with pytest.raises(InputError, match="has no setting 'width'"):
        build_model("lstm", PIANO, {"width": 3})


def test_stable_lstm_keeps_the_papers_conditions_in_training():
    model = build_model("stable-lstm", TEXT, {"hidden_size": 6})
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randint(7, (4, 9))).square().sum().backward()
        optimizer.step()
        model.project()
    layer = model.recurrence
    w_i, w_f, w_z, w_o = layer.weight_hh_l0.abs().sum(1).view(4, -1).amax(1)
    assert w_i <= 0.36
    assert w_o <= 0.36
    assert w_z <= 0.09
    assert w_f <= 0.128
    assert layer.weight_ih_l0.view(4, 6, -1)[1].abs().sum(1).max() <= 0.25
    assert (layer.bias_ih_l0 + layer.bias_hh_l0).view(4, 6)[1].abs().max() <= 0.25
    assert model.embedding.weight.abs().max() <= 0.75


@pytest.mark.parametrize("width", [3, 5, 9])
def test_a_projected_state_is_read_four_times_as_large_at_first(width):
    settings = {"hidden_size": 5, "embedding_size": width, "tied": True, "projected": True}
    model = build_model("rnn", TEXT, settings).eval()
    words = torch.randint(7, (2, 6))
    state, _ = model.recurrence(model.embedding(words))
    copies = torch.cat([state, state], -1)
    wanted = {3: state[..., :3] + torch.nn.functional.pad(state[..., 3:], (0, 1)), 5: state, 9: copies[..., :9]}[width]
    torch.testing.assert_close(model.advance_hidden(words, model.init_cache(2))[0], 4 * wanted)


@pytest.mark.parametrize("name", ["rnn", "stable-rnn", "certified-rnn"])
def test_leaky_units_start_as_averages_of_their_own_past(name):
    model = build_model(name, PIANO, {"hidden_size": 8, "layers": 2, "leaky_units": 0.5}).eval()
    model(torch.randn(1, 3, 5))
    for weight in (model.recurrence.weight_hh_l0, model.recurrence.weight_hh_l1):
        torch.testing.assert_close(weight[:4, :4], 0.95 * torch.eye(4))
        assert not weight[:4, 4:].any()
        assert not weight[4:, :4].any()
        assert weight[4:, 4:].all()
    slow = build_model("certified-rnn", PIANO, {"hidden_size": 8, "rate": 0.5, "leaky_units": 0.99}).eval()
    torch.testing.assert_close(slow.recurrence.weight_hh_l0, 0.5 * torch.eye(8), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("lstm", {"input_kernel": 3}), ("certified-gru", {}), ("stable-lstm", {}), ("certified-lstm-plain", {})],
)
def test_certificates_hold_for_what_the_layers_read_of_the_data(name, settings):
    """Not for the features themselves: clipped, or read through a convolution, they drive the layers elsewhere."""
    torch.manual_seed(0)
    model = build_model(name, PIANO, {"hidden_size": 12, **settings})
    sequences = [torch.rand(steps, 1) * 2 + 1.5 + torch.arange(5) for steps in (20, 7)]
    certificate = model.certificate(inputs=sequences)
    assert model.training
    model.eval()
    queues = model.init_cache(1)[model.state_parts :]
    read = [model.layer_inputs(features[None], queues)[0] for features in sequences]
    assert all(certificate.holds_for(each) for each in read)
    naive = certify(model.recurrence, inputs=torch.cat(sequences))
    assert not all(naive.holds_for(each) for each in read)


def test_a_bound_of_the_features_is_one_of_what_a_convolution_makes_of_them():
    torch.manual_seed(0)
    model = build_model("lstm", PIANO, {"hidden_size": 12, "input_kernel": 3}).eval()
    bound = model.front.bound(2.0)
    most = 0.0
    for kernel in model.front.convolution.weight[:5].detach():  # the inputs that drive each entry furthest
        read, _ = model.layer_inputs(2 * kernel.sign().T[None], model.init_cache(1)[model.state_parts :])
        most = max(most, read.abs().max().item())
    assert 0.3 * bound < most <= bound
    assert model.certificate(input_bound=2.0).holds_for(torch.full((1, 1, 5), bound * (1 - 1e-6)))


def test_inputs_and_bounds_that_are_none_get_one_sentence():
    model = build_model("lstm", PIANO, {"hidden_size": 5, "input_kernel": 2})
    unfit = [
        ({"inputs": []}, "inputs is empty"),
        ({"inputs": torch.zeros(9, 5)}, r"list of sequences"),
        ({"inputs": [torch.zeros(9, 4)]}, "reads 5 features"),
        ({"input_bound": -0.01}, "input_bound"),
        ({"input_bound": True}, "input_bound"),
    ]
    for given, words in unfit:
        with pytest.raises(InputError, match=words):
            model.certificate(**given)
    doubled = model.certificate(inputs=iter([torch.zeros(9, 5).double()]))
    assert doubled.holds_for(model.layer_inputs(torch.zeros(1, 9, 5), model.init_cache(1)[2:])[0])


def test_models_of_symbols_are_certified_for_all_there_are():
    for settings in ({}, {"input_kernel": 2}):
        model = build_model("certified-lstm", TEXT, {"hidden_size": 5, **settings})
        assert model.certificate().stable
        for covered in ({"inputs": [torch.randn(3, 64)]}, {"input_bound": 1.0}):
            with pytest.raises(InputError, match="certified for all there are"):
                model.certificate(**covered)


@pytest.mark.parametrize("name", ["stable-rnn", "stable-lstm", "certified-rnn", "certified-lstm", "certified-gru"])
def test_constrained_models_keep_their_rate_under_the_training_loops_optimizer(name):
    """The loop's optimizer is fused, and fused kernels write to the weights without counting up their versions."""
    model = build_model(name, PIANO, {"hidden_size": 12})
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=0.1))
    for _ in range(40):
        optimizer.zero_grad()
        (model(torch.randn(3, 9, 5)) - torch.randn(3, 9, 4)).square().mean().backward()
        optimizer.step()
        model.project()
    model.eval()
    certificate = model.certificate(input_bound=1.0)
    assert certificate.stable
    assert certificate.rate <= 0.98 or name == "stable-rnn"
    inputs = torch.randn(2, 7, 5)
    loaded = build_model(name, PIANO, {"hidden_size": 12})
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded.eval()(inputs), model(inputs))


@pytest.mark.parametrize("name", ["certified-gru", "stable-lstm", "certified-lstm-plain", "certified-lstm-coupled"])
def test_models_that_need_bounded_inputs_refuse_a_convolution_before_them(name):
    with pytest.raises(InputError, match="leave out input_kernel"):
        small_model(name, TEXT, input_kernel=2)


def test_tied_words_share_one_table_and_need_the_same_symbols():
    model = small_model("lstm", TEXT, tied=True, embedding_size=5)
    assert model.readout.weight is model.embedding.weight
    narrower = small_model("lstm", TEXT, tied=True, embedding_size=3)
    assert narrower.readout.weight is narrower.embedding.weight
    with pytest.raises(InputError, match="same symbols"):
        small_model("lstm", PIANO, tied=True)


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("wavenet", {"cycles": 0}, "cycles of 'wavenet' must be a whole number"),
        ("wavenet", {"layers": 40}, "choose fewer layers"),
        ("transformer", {"heads": 1.5}, "heads of 'transformer' must be a whole number"),
        ("transformer", {"head_size": 3}, "head_size must be even"),
        ("transformer", {"window": 0}, "window of 'transformer' must be a whole number"),
        ("transformer", {"heads": None}, "heads of 'transformer' must be a whole number"),
        ("ngram-lstm", {"k": 0}, "k of 'ngram-lstm' must be a whole number"),
        ("ngram-lstm", {"window": None}, "has no setting 'window'"),
    ],
)
def test_bad_settings_get_one_sentence(name, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        build_model(name, PIANO, settings)
