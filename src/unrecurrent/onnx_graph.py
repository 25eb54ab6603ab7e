"""The recurrent nodes of an ONNX graph: their weights as torch layers or cells, and what they read as the graph runs.

Gate orders differ: ONNX has an LSTM's gates as i, o, f, c and a GRU's as z, r, h; torch has i, f, c, o and r, z, n.
Source: the ONNX operator specification, operators LSTM, GRU and RNN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unrecurrent.cells import BoxInput, GRUCell, InputSet, Interval, PointInput
from unrecurrent.certificate import Certificate, certify
from unrecurrent.errors import InputError
from unrecurrent.memory import MemoryProfile, measure_memory
from unrecurrent.trajectories import CellLayer

OPERATORS = ("LSTM", "GRU", "RNN")
#: where torch's gate g stands among those of ONNX
GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
DEFAULT_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh"), "RNN": ("tanh",)}
#: numbers from one run of the tail this close to those of the whole graph are the same
TOLERANCE = 1e-4


def _onnx() -> Any:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise InputError("ONNX files need two more packages: pip install 'unrecurrent[onnx]'") from error
    return onnx, onnxruntime


def load_graph(path: str | Path) -> "Graph":
    """Read an ONNX file.

    Raises:
        InputError: no such file, no ONNX model, or a package that is missing.
    """
    onnx, _ = _onnx()
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}: give the path of an ONNX model")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker raise many kinds
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise InputError(f"{path} is no valid ONNX model ({reason[0]}): export it again") from error
    return Graph(model, str(path))


@dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX model: its recurrent nodes, and what flows through it."""

    model: Any
    path: str

    @cached_property
    def nodes(self) -> list["RecurrentNode"]:
        """The recurrent nodes of the main graph.

        Raises:
            InputError: there is none, one lies inside an If, Loop or Scan, or has a form that is not supported.
        """
        found = [RecurrentNode.of(node, self) for node in self.model.graph.node if node.op_type in OPERATORS]
        if not found:
            inner = _inner_recurrent(self.model.graph)
            where = f"its {inner[1]} lies inside a node {inner[0]}" if inner else "it has no LSTM, GRU or RNN node"
            raise InputError(f"{self.path} cannot be measured: {where}; export the model with one in the main graph")
        return found

    @property
    def initializers(self) -> dict[str, np.ndarray]:
        onnx, _ = _onnx()
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    def feeds(self, data: Mapping[str, np.ndarray] | np.ndarray) -> dict[str, np.ndarray]:
        """Name the arrays after the graph's inputs; initial states that are inputs and not given are zero.

        One array alone is the input that is neither an initial state nor a sequence length.
        """
        constants = self.initializers
        inputs = {v.name: v.type.tensor_type for v in self.model.graph.input if v.name not in constants}
        states = {name for node in self.nodes for name in node.states if name}
        if not isinstance(data, Mapping):
            lengths = {node.lengths for node in self.nodes}
            free = [name for name in inputs if name not in states | lengths]
            if len(free) != 1:
                names = ", ".join(free) or "none"
                raise InputError(f"{self.path} has the inputs {names}: give an .npz file with an array for each")
            data = {free[0]: data}
        unknown = [name for name in data if name not in inputs]
        if unknown:
            raise InputError(f"{self.path} has no input {unknown[0]!r}: its inputs are {', '.join(inputs)}")
        feeds = {name: _as_type(array, inputs[name], name) for name, array in data.items()}
        sizes = {"": 1}  # of the dimensions that have a name, as the batch may have
        for name, array in feeds.items():
            named = zip(inputs[name].shape.dim, array.shape, strict=True)
            sizes |= {dimension.dim_param: size for dimension, size in named if dimension.dim_param}
        for name in inputs.keys() - feeds.keys():
            if name not in states:
                raise InputError(f"{self.path} needs the input {name!r}: give an .npz file with an array of that name")
            shape = [d.dim_value or sizes.get(d.dim_param, 1) for d in inputs[name].shape.dim]
            feeds[name] = np.zeros(shape, _onnx()[0].helper.tensor_dtype_to_np_dtype(inputs[name].elem_type))
        return feeds

    def run(self, feeds: Mapping[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
        """Run the graph and return the values of any tensors in it."""
        onnx, _ = _onnx()
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        present = {output.name for output in model.graph.output}
        model.graph.output.extend(
            onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in present
        )
        return _run(model, feeds, names, self.path)

    def certificates(
        self,
        data: Mapping[str, np.ndarray] | np.ndarray | None = None,
        *,
        input_bound: float | None = None,
        method: str = "best",
    ) -> dict[str, Certificate]:
        """What is proved about each recurrent node, by name; without data its weights must be constants.

        `input_bound` is about what the node itself reads; data say which drives the statement covers.
        """
        if data is not None and input_bound is not None:
            raise InputError("give only one of data and input_bound: each says which inputs are allowed")
        if data is not None:
            found = self.captured(self.feeds(data))
        else:
            found = [Captured(node, self, self.initializers) for node in self.nodes]
        return {c.node.name: c.certify(seen=data is not None, input_bound=input_bound, method=method) for c in found}

    def captured(self, feeds: Mapping[str, np.ndarray]) -> list["Captured"]:
        """Run the graph once and return what each recurrent node read and gave."""
        constants = self.initializers
        wanted = [n for node in self.nodes for n in (*node.inputs, *node.outputs[:1]) if n and n not in constants]
        outputs = [output.name for output in self.model.graph.output]
        names = [name for name in dict.fromkeys([*wanted, *outputs]) if name not in feeds]
        values = dict(zip(names, self.run(feeds, names), strict=True))
        return [Captured(node, self, {**constants, **feeds, **values}) for node in self.nodes]


def _inner_recurrent(graph: Any) -> tuple[str, str] | None:
    """The first recurrent node inside a subgraph: the operator around it, and its own."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                for one in inner.node:
                    if one.op_type in OPERATORS:
                        return node.op_type, one.op_type
                deeper = _inner_recurrent(inner)
                if deeper:
                    return deeper
    return None


def _as_type(array: np.ndarray, wanted: Any, name: str) -> np.ndarray:
    dtype = _onnx()[0].helper.tensor_dtype_to_np_dtype(wanted.elem_type)
    shape = [d.dim_value for d in wanted.shape.dim]
    if array.ndim != len(shape) or any(d and d != a for d, a in zip(shape, array.shape, strict=True)):
        shown = " × ".join(str(d.dim_value or d.dim_param or "any") for d in wanted.shape.dim)
        raise InputError(f"the input {name!r} has shape {array.shape}, but the model reads {shown}: reshape the data")
    with np.errstate(over="ignore"):  # what is too large for the type becomes infinite
        array = array.astype(dtype, copy=False)
    if np.issubdtype(dtype, np.floating) and not np.isfinite(array).all():
        raise InputError(f"the input {name!r} holds NaN or infinite values, or too large ones: correct them first")
    return array


def _run(model: Any, feeds: Mapping[str, np.ndarray], names: Sequence[str], path: str) -> list[np.ndarray]:
    _, runtime = _onnx()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return list(session.run(list(names), dict(feeds)))
    except Exception as error:  # onnxruntime has an exception class of its own for each kind of failure
        reason = str(error).strip().splitlines()[0].split(" : ")[-1]
        raise InputError(f"onnxruntime cannot run {path} on these data: {reason}") from error


@dataclass(frozen=True, eq=False)
class RecurrentNode:
    """One LSTM, GRU or RNN node: the names of its tensors, `inputs` padded to all there can be, and its attributes."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reset_after: bool = True
    nonlinearity: str = "tanh"
    batch_first: bool = False

    @classmethod
    def of(cls, node: Any, graph: Graph) -> "RecurrentNode":
        """Read a node.

        Raises:
            InputError: it reads the future, or has activations, peepholes, clipping or coupled gates of its own.
        """
        onnx, _ = _onnx()
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        name = node.name or node.output[0] or node.op_type
        refused = _unsupported(node, attributes)
        if refused:
            raise InputError(f"the {node.op_type} node {name!r} of {graph.path} {refused}")
        activations = [a.decode().lower() for a in attributes.get("activations", ())]
        relu = node.op_type == "RNN" and activations == ["relu"]
        if activations and not relu and tuple(activations) != DEFAULT_ACTIVATIONS[node.op_type]:
            shown = ", ".join(activations)
            raise InputError(
                f"the {node.op_type} node {name!r} of {graph.path} has the activations {shown}: only the usual ones are"
                " supported"
            )
        inputs = (*node.input, *[""] * (8 - len(node.input)))
        after = node.op_type != "GRU" or bool(attributes.get("linear_before_reset", 0))
        first = bool(attributes.get("layout", 0))
        return cls(name, node.op_type, inputs, tuple(node.output), after, "relu" if relu else "tanh", first)

    @property
    def lengths(self) -> str:
        return self.inputs[4]

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the initial h and c; empty where there is none."""
        return self.inputs[5:7] if self.operator == "LSTM" else self.inputs[5:6]


def _unsupported(node: Any, attributes: Mapping[str, Any]) -> str | None:
    direction = attributes.get("direction", b"forward").decode()
    if direction != "forward":
        return f"is {direction}, so its outputs depend on the future: give a model with forward layers"
    if attributes.get("clip", 0):
        return "clips its gates, which is not supported: export it without `clip`"
    if attributes.get("input_forget", 0):
        return "couples its input gate to its forget gate, which is not supported"
    if len(node.input) > 7 and node.input[7]:
        return "has peephole connections, which are not supported"
    return None


@dataclass(frozen=True, eq=False)
class Captured:
    """A recurrent node with the values of all tensors around it in one run."""

    node: RecurrentNode
    graph: Graph
    values: dict[str, np.ndarray] = field(repr=False)

    def _value(self, position: int) -> np.ndarray | None:
        name = self.node.inputs[position]
        if name and name not in self.values:
            raise InputError(
                f"the node {self.node.name!r} computes its {name!r} as the graph runs: give data to run it"
            )
        return self.values[name] if name else None

    @cached_property
    def sequences(self) -> list[Tensor]:
        """What the node read, one (T, D) for each row of the batch, without padding."""
        x = torch.from_numpy(np.array(self._value(0)))
        rows = x if self.node.batch_first else x.transpose(0, 1)
        lengths = self._value(4)
        ends = [len(row) for row in rows] if lengths is None else lengths.tolist()
        return [row[:end].contiguous() for row, end in zip(rows, ends, strict=True)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The hidden states the node gave, one (T, H) for each row of the batch, without padding; [] if unused."""
        name = self.node.outputs[0]
        if not name:
            return []
        y = torch.from_numpy(np.array(self.values[name]))
        rows = y[:, :, 0] if self.node.batch_first else y[:, 0].transpose(0, 1)
        return [row[: len(sequence)] for row, sequence in zip(rows, self.sequences, strict=True)]

    @cached_property
    def start(self) -> tuple[Tensor, ...]:
        """The initial state: h (H,), for an LSTM (h, c); the same for all rows, or an `InputError`."""
        size = self.weights[1].shape[1]
        parts = []
        for name in self.node.states:
            state = np.zeros((1, size), np.float32) if not name else self.values[name].reshape(-1, size)
            if (state != state[:1]).any():
                raise InputError(
                    f"the initial states of {self.node.name!r} differ within the batch: give one sequence at a time"
                )
            parts.append(torch.from_numpy(np.array(state[0])).float())
        return tuple(parts)

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight_ih, weight_hh, bias_ih and bias_hh with their gates in torch's order."""
        weight_ih, weight_hh = (torch.from_numpy(np.array(self._value(p)))[0].float() for p in (1, 2))
        found = self._value(3)
        bias = torch.zeros(2 * len(weight_ih)) if found is None else torch.from_numpy(np.array(found))[0].float()
        order, size = GATES[self.node.operator], weight_hh.shape[1]
        tensors = (weight_ih, weight_hh, *bias.chunk(2))
        if not all(t.isfinite().all() for t in tensors):
            raise InputError(f"the node {self.node.name!r} has NaN or infinite weights: export the model again")
        mapped = [torch.cat([t[g * size : (g + 1) * size] for g in order]) for t in tensors]
        return mapped[0], mapped[1], mapped[2], mapped[3]

    def layer(self) -> nn.Module:
        """The node as a torch layer with `batch_first`, or as a `CellLayer` where torch has no such form.

        A torch layer starts from zero; `module` starts where the graph did.
        """
        if not self.node.reset_after:
            cell = GRUCell(*self.weights, reset_after=False, start=self._start_interval)
            return CellLayer(cell, self.start[0].double())
        weight_ih, weight_hh = self.weights[:2]
        sizes = {"input_size": weight_ih.shape[1], "hidden_size": weight_hh.shape[1], "batch_first": True}
        if self.node.operator == "RNN":
            layer: nn.Module = nn.RNN(nonlinearity=self.node.nonlinearity, **sizes)
        else:
            layer = {"LSTM": nn.LSTM, "GRU": nn.GRU}[self.node.operator](**sizes)
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        layer.load_state_dict(dict(zip(names, self.weights, strict=True)))
        return layer.eval()

    def module(self) -> "NodeModule":
        """The node as a causal model (B, T, D) → (B, T, H) that starts where the graph did."""
        return NodeModule(self.layer(), self.start)

    def certify(self, *, seen: bool = True, input_bound: float | None = None, method: str = "best") -> Certificate:
        """What is proved about the node: for drives in the range `seen` in this run, else up to a bound, else for all.

        The states covered are those reached from the zero state and from the graph's own start.
        """
        inputs = torch.cat(self.sequences) if seen else None
        if self.node.reset_after:
            given = {"inputs": inputs, "input_bound": None if seen else input_bound, "h0": self._start_if_not_zero}
            return certify(self.layer(), method=method, **given)
        allowed: InputSet | None = None if inputs is None else PointInput(inputs)
        if not seen and input_bound is not None:
            allowed = BoxInput.bounded(input_bound, self.weights[0].shape[1])
        cell = GRUCell(*self.weights, reset_after=False, inputs=allowed, start=self._start_interval)
        return certify(cell, method=method)

    @property
    def _start_interval(self) -> Interval | None:
        start = self._start_if_not_zero
        return None if start is None else Interval(start.flatten().double(), start.flatten().double())

    @property
    def _start_if_not_zero(self) -> Any:
        """The start state in the layout of torch's layers, where there is a given one that is not zero."""
        if not all(name in self.values for name in self.node.states if name):
            return None
        parts = [part.expand(1, 1, -1) for part in self.start]
        if not any(bool(part.any()) for part in parts):
            return None
        return tuple(parts) if len(parts) > 1 else parts[0]

    @cached_property
    def tail(self) -> "Tail | None":
        """From the node's hidden states to the graph's first output, if that treats every step by itself."""
        if len(self.graph.nodes) > 1 or not self.node.outputs[0]:
            return None
        tail = Tail.of(self)
        return tail if tail is not None and tail.treats_steps_alone(self) else None


class NodeModule(nn.Module):
    """A recurrent node as a model: outputs alone, started from the graph's own initial state."""

    def __init__(self, layer: nn.Module, start: Sequence[Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.start = tuple(start)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, CellLayer):
            return self.layer(x)[0].to(x.dtype)
        parts = [part.expand(1, len(x), -1).contiguous() for part in self.start]
        return self.layer(x, parts[0] if len(parts) == 1 else tuple(parts))[0]


@dataclass(frozen=True, eq=False)
class Tail:
    """The part of a graph behind its recurrent node, run on hidden states (N, H): one output vector for each."""

    model: Any
    entry: str
    output: str
    feeds: dict[str, np.ndarray]
    shape: tuple[int, ...]
    path: str

    @classmethod
    def of(cls, captured: Captured) -> "Tail | None":
        """Cut the graph behind the node; None where its first output does not come from there alone."""
        onnx, _ = _onnx()
        entry, output = captured.node.outputs[0], captured.graph.model.graph.output[0].name
        if output in captured.node.outputs:
            return None
        needed, nodes = {output}, []
        for node in reversed(captured.graph.model.graph.node):
            if needed & set(node.output) and entry not in node.output:
                nodes.append(node)
                needed |= {name for name in node.input if name}
        if entry not in needed or needed & set(captured.node.outputs[1:]):
            return None
        model = onnx.ModelProto()
        model.CopyFrom(captured.graph.model)
        del model.graph.node[:], model.graph.output[:]
        model.graph.node.extend(reversed(nodes))
        model.graph.output.extend([onnx.ValueInfoProto(name=output)])
        shape = captured.values[entry].shape
        elem = onnx.helper.np_dtype_to_tensor_dtype(captured.values[entry].dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(entry, elem, [None] * len(shape)))
        used = {name for node in nodes for name in node.input}
        feeds = {v.name: captured.values[v.name] for v in model.graph.input if v.name in used and v.name != entry}
        for v in [v for v in model.graph.input if v.name != entry and v.name not in used]:
            model.graph.input.remove(v)
        return cls(model, entry, output, feeds, shape, captured.graph.path)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Outputs (N, O) for hidden states (N, H), fed as N steps of one sequence."""
        y = hidden.detach().cpu().float().numpy().reshape(len(hidden), 1, 1, -1)
        (outputs,) = self._run_once({self.entry: y})
        return torch.from_numpy(np.array(outputs)).reshape(len(hidden), -1)

    def _run_once(self, entry: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self._session.run([self.output], {**self.feeds, **entry}))

    @cached_property
    def _session(self) -> Any:
        _, runtime = _onnx()
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        return runtime.InferenceSession(self.model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def treats_steps_alone(self, captured: Captured) -> bool:
        """Whether the output at a step depends on that step's hidden state only: tried on steps in another order."""
        if captured.node.batch_first or len(captured.sequences) != 1:
            return False
        hidden, whole = captured.outputs[0], torch.from_numpy(np.array(captured.values[self.output]))
        if whole.numel() % len(hidden):
            return False
        order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))
        try:
            straight, shuffled, one = self(hidden), self(hidden[order]), self(hidden[:1])
        except Exception:  # whatever onnxruntime cannot do with single steps, it is no tail that treats them alone
            return False
        same = torch.allclose(straight.flatten(), whole.flatten(), atol=TOLERANCE)
        return (
            same
            and torch.allclose(straight[order], shuffled, atol=TOLERANCE)
            and torch.allclose(straight[:1], one, atol=TOLERANCE)
        )


def measure_graph(
    path: str | Path, data: Mapping[str, np.ndarray] | np.ndarray, **settings: Any
) -> dict[str, MemoryProfile]:
    """Measure the memory of every recurrent node of an ONNX file on real inputs, by name of the node.

    There are no targets: the loss of a truncation is the mean squared change of the graph's first output (of the node's
    hidden states where that output depends on other steps too), and k*(δ) the smallest k that changes it by at most δ
    of its variance. `settings` go to `measure_memory`. Nodes above others read what they read in the whole run.

    Raises:
        InputError: no valid ONNX file, a node that is not supported, or data that do not fit the graph's inputs.
    """
    graph = load_graph(path)
    profiles = {}
    for captured in graph.captured(graph.feeds(data)):
        module, tail = captured.module(), captured.tail
        sequences = [x for x in captured.sequences if len(x)]
        if not sequences:
            raise InputError(f"{path} was given sequences of length 0 only: give at least one step")
        with torch.no_grad():
            hidden = [module(x[None])[0] for x in sequences]
        outputs = hidden if tail is None else [tail(h) for h in hidden]
        scale = float(torch.cat(outputs).var(0, correction=0).mean())
        pairs = list(zip(sequences, outputs, strict=True))
        profiles[captured.node.name] = measure_memory(module, pairs, output_change(tail), scale=scale, **settings)
    return profiles


def output_change(tail: Tail | None) -> Any:
    """A loss of every step, (B, T): the mean squared difference of the outputs (behind `tail`) from those given."""

    def change(hidden: Tensor, outputs: Tensor) -> Tensor:
        seen = hidden if tail is None else tail(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        return (seen - outputs).square().mean(-1)

    return change
