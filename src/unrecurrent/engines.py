"""How many sequences at once are advanced by some steps, and what a step costs on this machine.

`ModuleEngine` calls the user's own module and is differentiable. `LoopEngine` runs the same equations for `nn.RNN`,
`nn.GRU` and `nn.LSTM` on the processor with fewer, larger products; it is faster than the module there and has no
gradient.
Both take and return the states of `torch.nn`: a tuple of parts, each `(layers, rows, H)`.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unrecurrent import kernels, onednn
from unrecurrent.errors import InputError

State = tuple[Tensor, ...]

# As many as chunks advance at once; the longer where the shorter takes less than _SHORT_RUN seconds.
_CALIBRATION_STEPS = (16, 32)
_SHORT_RUN = 5e-4
_FEW_ROWS, _MANY_ROWS = 16, 256


class Engine(Protocol):
    """Advances `rows` independent sequences: x is `(steps, rows, ...)`, y is `(steps, rows, H)`."""

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]: ...

    def zero_state(self, rows: int) -> State: ...


class ModuleEngine:
    """The user's own module, called on a batch of chunks; the plain engine, with gradients, on any device.

    `x` is `(T, B, ...)` whatever the module's own layout is; `h0` is the module's own kind of state, or None.
    Raises `InputError` when the module does not return `(y, state)` with states of shape `(layers, batch, ...)`.
    """

    def __init__(self, module: nn.Module, x: Tensor, h0: Any = None) -> None:
        self.module = module
        self.batch_first = bool(getattr(module, "batch_first", False))
        self.joined = isinstance(module, nn.RNN | nn.GRU)
        self._template: State = _layer_states(module) if isinstance(module, nn.RNNBase) else self._probe(x[:1], h0)

    def _probe(self, x: Tensor, h0: Any) -> State:
        first = x.transpose(0, 1) if self.batch_first else x
        try:
            with torch.no_grad():
                answer = self.module(first, h0)
        except TypeError as error:
            raise InputError(
                f"the module must take (x, state), as nn.LSTM does: wrap it so that it does ({error})"
            ) from error
        if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], Tensor)):
            raise InputError("the module must return (y, state), as nn.LSTM does: wrap it so that it does")
        y, state = answer
        self.joined = isinstance(state, Tensor)
        template = parts_of(state)
        if not template or any(not part.is_floating_point() for part in template):
            raise InputError("the module's state must be a tensor, or a tuple of tensors, of numbers: wrap it")
        if any(part.dim() < 2 or part.shape[1] != x.shape[1] for part in template):
            raise InputError("the module's state must have shape (layers, batch, ...): wrap it so that it has")
        if h0 is None:
            with torch.no_grad():
                again, _ = self.module(first, self.pack(tuple(torch.zeros_like(part) for part in template)))
            if not torch.equal(again, y):
                raise InputError(
                    "the module gives other outputs from zeros than without a state: pass its start state as h0, and"
                    " call module.eval() if two runs of it differ"
                )
        return template

    def pack(self, state: State) -> Any:
        return state[0] if self.joined else state

    def zero_state(self, rows: int) -> State:
        return tuple(part.new_zeros(part.shape[0], rows, *part.shape[2:]) for part in self._template)

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.batch_first:
            y, new = self.module(x, self.pack(state))
            return y, parts_of(new)
        y, new = self.module(x.transpose(0, 1), self.pack(state))
        return y.transpose(0, 1), parts_of(new)


class LoopEngine:
    """`nn.RNN`, `nn.GRU` and `nn.LSTM` on the processor: one input product for a block of steps, then one a step.

    The equations are those of `torch.nn` (for the GRU with the reset gate after the product). What a step does besides
    its product is one pass in C where that can be had (`kernels.py`); the loops here stand in for it, but for the LSTM,
    whose plain form is the module itself.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        self.hidden_size = module.hidden_size
        self.kind = module.mode.removesuffix("_TANH").lower()
        self.parts = len(_layer_states(module))
        self.layers = [_layer_weights(module, index, self.kind == "gru") for index in range(module.num_layers)]

    @staticmethod
    def takes(module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether the layer has a loop here for numbers of that type."""
        if type(module) not in (nn.RNN, nn.GRU, nn.LSTM) or module.bidirectional or not is_stock(module):
            return False
        if isinstance(module, nn.LSTM):
            return not module.proj_size and kernels.layer_gates("lstm", torch.empty(0, dtype=dtype)) is not None
        return dtype in (torch.float32, torch.float64)

    def zero_state(self, rows: int) -> State:
        weight = self.layers[0].recurrent.weight
        return tuple(weight.new_zeros(len(self.layers), rows, self.hidden_size) for _ in range(self.parts))

    def advance(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        ends: list[tuple[Tensor, ...]] = []
        for layer, *start in zip(self.layers, *state, strict=True):
            x, *cells = self._run(layer, x, *start)
            ends.append((x[-1], *cells))
        return x, tuple(map(torch.stack, zip(*ends, strict=True)))

    def _run(self, layer: "_Layer", x: Tensor, h: Tensor, *cells: Tensor) -> tuple[Tensor, ...]:
        gates = kernels.layer_gates(self.kind, h) if self.kind != "rnn_relu" else None
        if gates is not None:
            return self._in_c(
                gates, layer, x, h.contiguous(), *(cell.clone(memory_format=torch.contiguous_format) for cell in cells)
            )
        return (self._gru(layer, x, h) if self.kind == "gru" else self._rnn(layer, x, h),)

    def _in_c(self, gates: Any, layer: "_Layer", x: Tensor, h: Tensor, *cells: Tensor) -> tuple[Tensor, ...]:
        drive = layer.drive(x)
        y = drive if self.kind == "rnn" else drive.new_empty(*drive.shape[:2], self.hidden_size)
        is_rnn, is_gru = self.kind == "rnn", self.kind == "gru"
        for new, drive_now in zip(y, drive, strict=True):
            more = () if is_rnn else (drive_now, layer.candidate_bias, h) if is_gru else (drive_now, *cells)
            kernels.call_gated(gates, new, layer.recurrent(h), *more, new)
            h = new
        return y, *cells

    def _rnn(self, layer: "_Layer", x: Tensor, h: Tensor) -> Tensor:
        activation = _relu if self.kind == "rnn_relu" else torch.tanh
        y = layer.drive(x)
        for step in range(len(y)):
            h = activation(layer.recurrent(h).add_(y[step]), out=y[step])
        return y

    def _gru(self, layer: "_Layer", x: Tensor, h: Tensor) -> Tensor:
        drive, size = layer.drive(x), self.hidden_size
        y = drive.new_empty(*drive.shape[:2], size)
        for step, (gates_drive, new_drive) in enumerate(zip(*drive.split((2 * size, size), dim=-1), strict=True)):
            product = layer.recurrent(h)
            gates = product[:, : 2 * size].add_(gates_drive).sigmoid_()
            product = product[:, 2 * size :].add_(layer.candidate_bias)
            new = torch.addcmul(new_drive, gates[:, :size], product).tanh_()
            h = torch.lerp(new, h, gates[:, size:], out=y[step])
        return y


def _relu(pre: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(pre, 0.0, out=out)


class _Product:
    """x ↦ x Wᵀ + b for a fixed W, in the way that is fastest here for that many rows: each is tried once a process.

    Which one that is depends on the processor and on the sizes: oneDNN's packed product is twice as fast as the default
    BLAS on AMD processors with AVX-512; on those with AVX2 alone it wins for large weights and few rows only.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.ready: dict[str, Callable[[Tensor], Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        case = (*self.weight.shape, len(rows).bit_length(), self.weight.dtype, torch.get_num_threads())
        way = _fastest.get(case)
        if way is None:
            way = _fastest[case] = min(self._ways(), key=partial(self._seconds, rows))
            self.ready = {way: self._in(way)}
        y = self._in(way)(rows)
        return y if x.dim() == 2 else y.unflatten(0, x.shape[:-1])

    def _seconds(self, rows: Tensor, way: str) -> float:
        return _shortest(lambda: self._in(way)(rows), rows.device)

    def _ways(self) -> tuple[str, ...]:
        return ("transposed", "as it is", "oneDNN") if onednn.has_onednn(self.weight) else ("transposed", "as it is")

    def _in(self, way: str) -> Callable[[Tensor], Tensor]:
        if way not in self.ready:
            self.ready[way] = self._through_onednn() if way == "oneDNN" else self._through_blas(way == "transposed")
        return self.ready[way]

    def _through_onednn(self) -> Callable[[Tensor], Tensor]:
        packed = onednn.packed(self.weight.contiguous())
        return lambda x: onednn.product(x, packed, self.bias)

    def _through_blas(self, transposed: bool) -> Callable[[Tensor], Tensor]:
        right, bias = self.weight.t().contiguous() if transposed else self.weight.t(), self.bias
        return (lambda x: x @ right) if bias is None else (lambda x: torch.addmm(bias, x, right))


@dataclass(frozen=True)
class _Layer:
    drive: _Product
    recurrent: _Product
    #: of the candidate's product in a GRU, which the reset gate multiplies too
    candidate_bias: Tensor


def _layer_weights(module: nn.RNNBase, index: int, is_gru: bool) -> _Layer:
    def weight(name: str) -> Tensor:
        return getattr(module, f"{name}_l{index}").detach()

    size, drive_bias = module.hidden_size, None
    candidate_bias = weight("weight_hh").new_zeros(size)
    if module.bias:
        recurrent_bias = weight("bias_hh").clone()
        if is_gru:
            candidate_bias = recurrent_bias[2 * size :].clone()
            recurrent_bias[2 * size :] = 0
        drive_bias = weight("bias_ih") + recurrent_bias
    return _Layer(_Product(weight("weight_ih"), drive_bias), _Product(weight("weight_hh"), None), candidate_bias)


def choose_engine(plain: ModuleEngine, x: Tensor, differentiable: bool) -> Engine:
    """The fastest engine that gives what is asked: the module itself wherever gradients or another device are."""
    module = plain.module
    if differentiable or x.device.type != "cpu" or not LoopEngine.takes(module, x.dtype):
        return plain
    return LoopEngine(module)  # type: ignore[arg-type]


def is_stock(module: nn.Module) -> bool:
    """Whether a recurrent layer does what its weights say: the forward of its kind, and no hooks around it."""
    if not isinstance(module, nn.RNNBase) and not hasattr(module, "cell_kind"):
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    home = type(module).forward.__module__
    return not hooked and (home == nn.RNNBase.__module__ or home.startswith(f"{__package__}."))


def refuse_dropout(module: nn.Module) -> None:
    """Raise `InputError` where dropout between the layers is on; what a module of one's own calls so may be a layer."""
    dropout = getattr(module, "dropout", 0)
    if module.training and isinstance(dropout, int | float) and dropout > 0:
        raise InputError("dropout between the layers makes every run different: call module.eval() first")


def parts_of(state: Any) -> State:
    """The state as a tuple of its parts: (h,) for an RNN or GRU, (h, c) for an LSTM."""
    if isinstance(state, Tensor):
        return (state,)
    if isinstance(state, tuple | list) and all(isinstance(part, Tensor) for part in state):
        return tuple(state)
    raise InputError(f"a state must be a tensor or a tuple of tensors, not {type(state).__name__}")


def _layer_states(module: nn.RNNBase) -> State:
    like: Any = module.weight_hh_l0  # a parametrized module may have no parameters of its own
    layers = module.num_layers * (1 + module.bidirectional)
    hidden = like.new_empty(layers, 1, module.proj_size or module.hidden_size)
    return (hidden, like.new_empty(layers, 1, module.hidden_size)) if module.mode == "LSTM" else (hidden,)


@dataclass(frozen=True)
class StepCost:
    """Seconds a step takes: `sequential` for the user's own batch, `fixed + per_row * rows` for a batch of chunks."""

    sequential: float
    fixed: float
    per_row: float

    def batched(self, rows: int) -> float:
        return self.fixed + self.per_row * rows


@dataclass
class _Measured:
    """The shortest times seen for something, how often it was measured, and how often it should be."""

    seconds: tuple[float, ...] = ()
    rounds: int = 0
    wanted: int = 2

    def update(self, seconds: tuple[float, ...]) -> None:
        self.seconds = tuple(map(min, self.seconds, seconds)) if self.rounds else seconds
        self.rounds += 1


_MOST_SLOWER = 2.0
_MOST_ROUNDS = 8  # so that a disturbed measurement does not mislead a process for ever
_batched: dict[tuple[object, ...], _Measured] = defaultdict(_Measured)
_sequential: dict[tuple[object, ...], _Measured] = defaultdict(_Measured)
_seen: dict[tuple[object, ...], _Measured] = defaultdict(_Measured)
_fastest: dict[tuple[object, ...], str] = {}


def step_cost(engine: Engine, plain: ModuleEngine, x: Tensor) -> StepCost:
    """What a step costs on this machine; measured for each kind of module, batch, type, device and thread count."""
    batch = x.shape[1]
    few, many = (batch * max(least, -(-rows // batch)) for least, rows in ((1, _FEW_ROWS), (2, _MANY_ROWS)))
    measured = _batched[(type(engine), *_kind(plain, x))]
    if measured.rounds < measured.wanted:
        with torch.no_grad():
            measured.update((_batched_step(engine, x, few), _batched_step(engine, x, many)))
    at_few, at_many = measured.seconds
    per_row = max((at_many - at_few) / (many - few), 0.1 * at_many / many)
    return StepCost(sequential_step(plain, x), max(at_few - per_row * few, 0.05 * at_few), per_row)


def sequential_step(plain: ModuleEngine, x: Tensor) -> float:
    """Seconds a step of the user's own run takes, measured likewise.

    On a part of the sequence, up to 2,048 steps: a shorter one would not show what a long one costs in memory traffic.
    Even this one shows a part of that only, so that whole runs of about that length, where the module had to run, count
    instead: from the second on, the shortest of them, and at most `_MOST_SLOWER` times what the part says.
    """
    measured = _sequential[_kind(plain, x)]
    if measured.rounds < measured.wanted:
        steps = max(min(len(x), 64), min(len(x) // 64, 2048))
        with torch.no_grad():
            seconds = _shortest(lambda: plain.advance(x[:steps], plain.zero_state(x.shape[1])), x.device)
        measured.update((seconds / steps,))
    seen = _seen[(len(x).bit_length(), *_kind(plain, x))]
    part = measured.seconds[0]
    return min(max(part, seen.seconds[0]), _MOST_SLOWER * part) if seen.rounds > 1 else part


def doubt_step_cost(engine: Engine, plain: ModuleEngine, x: Tensor) -> None:
    """Let the cost of a batched step be measured once more next time: it kept the module from running in parallel.

    Unless that would take longer than the module's own run.
    """
    measured = _batched[(type(engine), *_kind(plain, x))]
    if not measured.rounds:
        return
    again = 4 * _CALIBRATION_STEPS[0] * sum(measured.seconds)
    if again < sequential_step(plain, x) * len(x):
        measured.wanted = max(measured.wanted, min(measured.rounds + 1, _MOST_ROUNDS))


def learn_sequential_step(plain: ModuleEngine, first: Tensor, steps: int, seconds: float) -> None:
    """Take note of what the user's own run over so many steps took, of which `first` (1, B, ...) is the first."""
    _seen[(steps.bit_length(), *_kind(plain, first))].update((seconds / steps,))


def forget_costs() -> None:
    """Measure afresh what a step costs, for instance after the machine was busy."""
    for known in (_batched, _sequential, _seen, _fastest):
        known.clear()


def _kind(plain: ModuleEngine, x: Tensor) -> tuple[object, ...]:
    shapes = tuple(parameter.shape for parameter in plain.module.parameters())
    return repr(plain.module), shapes, tuple(x.shape[1:]), x.dtype, x.device, torch.get_num_threads()


def _batched_step(engine: Engine, x: Tensor, rows: int) -> float:
    shape = [1, rows // x.shape[1]] + [1] * (x.dim() - 2)

    def seconds(steps: int) -> float:
        block = x[:steps].repeat(shape)
        return _shortest(lambda: engine.advance(block, engine.zero_state(rows)), x.device)

    few, many = (min(steps, len(x)) for steps in _CALIBRATION_STEPS)
    short = seconds(few)
    return short / few if short > _SHORT_RUN else seconds(many) / many


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of three runs: the first one may set things up, and another process may disturb one."""
    times = []
    for _ in range(3):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
