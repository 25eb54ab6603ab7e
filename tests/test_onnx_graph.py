"""Recurrent nodes of ONNX graphs: weights, inputs, lengths and start states against onnxruntime's own outputs."""

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="needs the package onnx")
pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from unrecurrent.errors import InputError  # noqa: E402
from unrecurrent.onnx_graph import load_graph, measure_graph  # noqa: E402
from unrecurrent.trajectories import CellLayer  # noqa: E402

GATE_COUNT = {"LSTM": 4, "GRU": 3, "RNN": 1}
T, B, D, H = 63, 3, 4, 5


def node_model(operator, *, lengths=False, states=False, bias=True, tail=True, scale=0.6, **attributes):
    """A graph of one recurrent node, and behind it (`tail`) a linear layer and a tanh, step by step."""
    generator = np.random.default_rng(0)
    rows = GATE_COUNT[operator] * H

    def constant(name, *shape):
        return numpy_helper.from_array((scale * generator.normal(size=shape)).astype(np.float32), name)

    constants = [constant("W", 1, rows, D), constant("R", 1, rows, H), constant("B", 1, 2 * rows), constant("V", H, 2)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", "batch", D])]
    names = ["x", "W", "R", "B" if bias else "", "lengths" if lengths else "", "", ""]
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]))
    for position, name in ((5, "h0"), (6, "c0"))[: 2 if operator == "LSTM" else 1] if states else ():
        names[position] = name
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "batch", H]))
    while not names[-1]:
        names.pop()
    nodes = [helper.make_node(operator, names, ["Y", "Y_h"], "recurrence", hidden_size=H, **attributes)]
    if tail:
        nodes += [helper.make_node("MatMul", ["Y", "V"], ["linear"]), helper.make_node("Tanh", ["linear"], ["y"])]
    output = helper.make_tensor_value_info("y" if tail else "Y", TensorProto.FLOAT, ["t", "one", "b", "f"])
    graph = helper.make_graph(nodes, "test", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def saved(tmp_path):
    def save(model):
        onnx.save(model, tmp_path / "model.onnx")
        return tmp_path / "model.onnx"

    return save


FORMS = [
    ("LSTM", {}),
    ("LSTM", {"bias": False}),
    ("GRU", {"linear_before_reset": 1}),
    ("GRU", {"linear_before_reset": 0}),
    ("GRU", {}),
    ("RNN", {}),
    ("RNN", {"activations": ["Relu"], "scale": 0.2}),
]


@pytest.mark.parametrize(("operator", "form"), FORMS)
@pytest.mark.parametrize("states", [False, True])
def test_nodes_give_what_onnxruntime_gives(operator, form, states, saved):
    graph = load_graph(saved(node_model(operator, states=states, **form)))
    x = np.random.default_rng(1).normal(size=(T, B, D)).astype(np.float32)
    given = {"x": x}
    if states:
        start = 0.5 * np.random.default_rng(2).normal(size=(1, 1, H)).astype(np.float32)
        given["h0"] = np.repeat(start, B, 1)
        if operator == "LSTM":
            given["c0"] = np.repeat(2 * start, B, 1)
    (captured,) = graph.captured(graph.feeds(given))
    with torch.no_grad():
        found = captured.module()(torch.stack(captured.sequences))
    torch.testing.assert_close(found, torch.stack(captured.outputs), atol=1e-5, rtol=1e-5)
    assert isinstance(captured.layer(), CellLayer) == (operator == "GRU" and not form.get("linear_before_reset"))


def test_sequence_lengths_cut_what_was_read(saved):
    graph = load_graph(saved(node_model("LSTM", lengths=True)))
    x = np.random.default_rng(1).normal(size=(T, B, D)).astype(np.float32)
    (captured,) = graph.captured(graph.feeds({"x": x, "lengths": np.array([T, 7, 30])}))
    assert [len(s) for s in captured.sequences] == [T, 7, 30]
    module = captured.module()
    with torch.no_grad():
        for sequence, output in zip(captured.sequences, captured.outputs, strict=True):
            torch.testing.assert_close(module(sequence[None])[0], output, atol=1e-5, rtol=1e-5)


def test_sequences_without_a_step_are_left_out(saved):
    path = saved(node_model("LSTM", lengths=True, tail=False))
    data = {"x": np.random.default_rng(1).normal(size=(T, B, D)), "lengths": np.array([T, 0, 30])}
    (profile,) = measure_graph(path, data, positions=20, longest=8, steps=20).values()
    assert len(profile.full_losses) == 20
    with pytest.raises(InputError, match="length 0 only"):
        measure_graph(path, {**data, "lengths": np.zeros(B)}, positions=20)


def test_states_that_are_not_given_are_zero_for_each_of_a_batch(saved):
    graph = load_graph(saved(node_model("LSTM", states=True)))
    feeds = graph.feeds(np.ones((T, B, D)))
    assert feeds["h0"].shape == (1, B, H)
    assert len(graph.captured(feeds)[0].sequences) == B


def test_a_certificate_covers_the_start_the_graph_was_given(saved):
    graph = load_graph(saved(node_model("LSTM", states=True, scale=0.05)))
    x, far = np.ones((T, 1, D)), np.full((1, 1, H), 9.0)
    (near,) = graph.certificates({"x": x}).values()
    (wide,) = graph.certificates({"x": x, "h0": 0 * far, "c0": far}).values()
    assert near.stable
    assert wide.horizon(0.01) is None or wide.horizon(0.01) > near.horizon(0.01)


def test_a_certificate_covers_the_start_of_the_other_gru_form(saved):
    """The difference of the real states stays below what is proved from a start outside the usual bounds."""
    graph = load_graph(saved(node_model("GRU", linear_before_reset=0, states=True, scale=0.1, tail=False)))
    x = np.random.default_rng(1).normal(size=(T, 1, D))
    far = {"x": x, "h0": np.full((1, 1, H), 9.0)}
    (proved,) = graph.certificates(far).values()
    ends = [graph.captured(graph.feeds(data))[0].outputs[0] for data in ({"x": x}, far)]
    apart = (ends[0] - ends[1]).abs().amax(1)
    for eps in (1.0, 0.5, 0.2):
        horizon = proved.horizon(eps)
        assert horizon is None or float(apart[horizon:].max()) <= eps


def test_tail_gives_the_graph_s_output_from_hidden_states(saved):
    graph = load_graph(saved(node_model("GRU", linear_before_reset=1)))
    x = np.random.default_rng(1).normal(size=(T, 1, D)).astype(np.float32)
    (captured,) = graph.captured(graph.feeds(x))
    whole = torch.from_numpy(graph.run(graph.feeds(x), ["y"])[0]).reshape(T, 2)
    torch.testing.assert_close(captured.tail(captured.outputs[0]), whole, atol=1e-6, rtol=1e-5)


def test_tail_that_mixes_steps_is_not_used(saved):
    model = node_model("LSTM", tail=False)
    model.graph.node.append(helper.make_node("CumSum", ["Y", "axis"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "axis"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", "one", "b", "f"]))
    graph = load_graph(saved(model))
    (captured,) = graph.captured(graph.feeds(np.ones((T, 1, D))))
    assert captured.tail is None


@pytest.mark.parametrize(("operator", "form"), [("LSTM", {}), ("GRU", {"linear_before_reset": 0})])
def test_profile_of_a_node(operator, form, saved):
    path = saved(node_model(operator, scale=0.2, **form))
    x = np.random.default_rng(1).normal(size=(400, 1, D)).astype(np.float32)
    ((name, profile),) = measure_graph(path, x, positions=40, longest=40, steps=60).items()
    assert name == "recurrence"
    assert 1 <= profile.k(0.01) <= 20
    assert profile.k(0.1) <= profile.k(0.01) <= profile.k(0.0001)
    (layer,) = profile.layers
    assert layer.forgetting.settled(1e-2) is not None
    assert layer.certificate is not None
    assert profile.gradient_decay.mean[0] > 10 * profile.gradient_decay.mean[-1] > 0
    assert "of their variance" in profile.verdict()


def test_certificates_of_both_gru_forms(saved):
    x = np.random.default_rng(1).normal(size=(T, 1, D)).astype(np.float32)
    for form in (0, 1):
        graph = load_graph(saved(node_model("GRU", linear_before_reset=form, scale=0.1)))
        (seen,), (bounded,) = graph.certificates(x).values(), graph.certificates(input_bound=9.0).values()
        assert seen.stable
        assert bounded.stable
        assert seen.rate <= bounded.rate


def in_a_branch():
    model = node_model("LSTM")
    inner = helper.make_graph(
        list(model.graph.node),
        "then",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", "one", "b", "f"])],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "else",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["t", "b", "f"])],
    )
    branch = helper.make_node("If", ["on"], ["out"], then_branch=inner, else_branch=other)
    inputs = [*model.graph.input, helper.make_tensor_value_info("on", TensorProto.BOOL, [])]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["t", "one", "b", "f"])
    graph = helper.make_graph([branch], "test", inputs, [output], list(model.graph.initializer))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def plain_model():
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: node_model("LSTM", direction="reverse"), "depend on the future"),
        (lambda: node_model("LSTM", clip=1.0), "clips its gates"),
        (lambda: node_model("RNN", activations=["Sigmoid"]), "only the usual ones"),
        (in_a_branch, "inside a node If"),
        (plain_model, "no LSTM, GRU or RNN node"),
    ],
)
def test_unsupported_graphs_are_one_sentence(model, said, saved):
    graph = load_graph(saved(model()))
    with pytest.raises(InputError, match=said) as raised:
        _ = graph.nodes
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (np.ones((3, 1, D + 1)), "but the model reads time × batch × 4"),
        (np.full((3, 1, D), np.nan), "NaN or infinite"),
        (np.full((3, 1, D), 1e300), "or too large ones"),
        ({"z": np.ones(3)}, "no input 'z'"),
    ],
)
@pytest.mark.filterwarnings("error:overflow")
def test_data_that_do_not_fit_are_one_sentence(data, said, saved):
    graph = load_graph(saved(node_model("LSTM")))
    with pytest.raises(InputError, match=said):
        graph.feeds(data)


def test_a_missing_input_is_named(saved):
    graph = load_graph(saved(node_model("LSTM", lengths=True)))
    with pytest.raises(InputError, match="needs the input 'lengths'"):
        graph.feeds(np.ones((3, 1, D)))


def test_files_that_are_no_onnx_model(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        load_graph(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="no valid ONNX model"):
        load_graph(tmp_path / "bad.onnx")


def test_real_voice_detector_is_read_as_onnxruntime_runs_it(data_dir):
    path = data_dir / "trained/silero-vad/silero_vad_16k_sequence.onnx"
    if not path.is_file():
        pytest.skip("needs trained/silero-vad in UNRECURRENT_DATA")
    graph = load_graph(path)
    frames = 0.1 * np.random.default_rng(0).normal(size=(300, 576)).astype(np.float32)
    (captured,) = graph.captured(graph.feeds(frames))
    with torch.no_grad():
        hidden = captured.module()(captured.sequences[0][None])[0]
    torch.testing.assert_close(hidden, captured.outputs[0], atol=2e-5, rtol=1e-4)
    probabilities = graph.run(graph.feeds(frames), ["speech_probs"])[0]
    np.testing.assert_allclose(captured.tail(hidden)[:, 0], probabilities, atol=1e-5)
