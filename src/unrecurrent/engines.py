"""How many sequences at once are advanced by some steps, and what a step costs on this machine.

`ModuleEngine` calls the user's own module and is differentiable. `LoopEngine` runs the same equations for `nn.RNN`,
`nn.GRU`, `nn.LSTM` and the layers that keep themselves stable on the processor, without gradients; many rows at once
are faster there than in the module.
Both take and return the states of `torch.nn`: a tuple of parts, each `(layers, rows, H)`.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent import kernels
from unrecurrent.errors import InputError
from unrecurrent.self_keeping import SelfKeeping
from unrecurrent.stock import is_stock

State = tuple[Tensor, ...]

# The longer, nearer to the blocks of a run, where the shorter takes less than _SHORT_RUN seconds.
_CALIBRATION_STEPS = (16, 64)
_SHORT_RUN = 5e-4
_FEW_ROWS, _MANY_ROWS = 24, 192


class Engine(Protocol):
    """Advances `rows` independent sequences: x is `(steps, rows, ...)`, y `(steps, rows, H)`, in `out` if given."""

    def advance(self, x: Tensor, state: State, out: Tensor | None = None) -> tuple[Tensor, State]: ...

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

    def advance(self, x: Tensor, state: State, out: Tensor | None = None) -> tuple[Tensor, State]:
        y, new = self.module(x.transpose(0, 1) if self.batch_first else x, self.pack(state))
        y = y.transpose(0, 1) if self.batch_first else y
        return y if out is None else out.copy_(y), parts_of(new)


class LoopEngine:
    """The layers of torch and those that keep themselves stable on the processor, many steps of many rows in one call.

    The equations are those of `torch.nn` (for the GRU with the reset gate after the product) and of `StableLSTM`. They
    run in C where that can be had (`recurrence.c`); the loops here stand in for it, but for the LSTMs, whose plain form
    is the module itself.
    """

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, SelfKeeping):
            module.keep_before_use()
        self.kind = _kind_of(module)
        self.hidden_size: int = module.hidden_size  # type: ignore[assignment]
        self.parts = 2 if "lstm" in self.kind else 1
        depth: int = module.num_layers  # type: ignore[assignment]
        self.layers = [_layer_weights(module, index, self.kind) for index in range(depth)]
        in_c = kernels.Recurrence.takes(self.layers[0].weight_hh.dtype)
        self.compiled = [layer.compiled(self.kind) for layer in self.layers] if in_c else None

    @staticmethod
    def takes(module: nn.Module, dtype: torch.dtype) -> bool:
        """Whether the layer has a loop here for numbers of that type."""
        known = isinstance(module, nn.RNN | nn.GRU | nn.LSTM | SelfKeeping)
        if not (known and is_stock(module)) or module.bidirectional or module.proj_size:
            return False
        plain = "lstm" not in _kind_of(module) and dtype in (torch.float32, torch.float64)
        return plain or kernels.Recurrence.takes(dtype)

    def zero_state(self, rows: int) -> State:
        weight = self.layers[0].weight_hh
        return tuple(weight.new_zeros(len(self.layers), rows, self.hidden_size) for _ in range(self.parts))

    def advance(self, x: Tensor, state: State, out: Tensor | None = None) -> tuple[Tensor, State]:
        ends: list[tuple[Tensor, ...]] = []
        for index, start in enumerate(zip(*state, strict=True)):
            last = index == len(self.layers) - 1
            y = out if last and out is not None else x.new_empty(*x.shape[:2], self.hidden_size)
            cells = self._run(index, x, y, *start)
            x = y
            ends.append((x[-1], *cells))
        return x, tuple(map(torch.stack, zip(*ends, strict=True)))

    def _run(self, index: int, x: Tensor, y: Tensor, h: Tensor, *cells: Tensor) -> tuple[Tensor, ...]:
        """One layer over x `(steps, rows, D)` into y; returns the new cell state where there is one."""
        if self.compiled is not None:
            cells = tuple(cell.clone(memory_format=torch.contiguous_format) for cell in cells)
            self.compiled[index].run(x, h.resolve_neg().contiguous(), cells[0] if cells else None, y)
        elif self.kind == "gru":
            _gru(self.layers[index], x, h, y)
        else:
            _rnn(self.layers[index], x, h, y, _relu if self.kind == "rnn_relu" else torch.tanh)
        return cells


def _rnn(layer: "_Layer", x: Tensor, h: Tensor, y: Tensor, activation: Callable[..., Tensor]) -> None:
    for new, drive in zip(y, F.linear(x, layer.weight_ih, layer.bias), strict=True):
        h = activation(drive.add_(h @ layer.weight_hh.T), out=new)


def _relu(pre: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(pre, 0.0, out=out)


def _gru(layer: "_Layer", x: Tensor, h: Tensor, y: Tensor) -> None:
    size = len(layer.candidate_bias)
    for new, drive in zip(y, F.linear(x, layer.weight_ih, layer.bias), strict=True):
        product = h @ layer.weight_hh.T
        gates = product[:, : 2 * size].add_(drive[:, : 2 * size]).sigmoid_()
        product = product[:, 2 * size :].add_(layer.candidate_bias)
        candidate = torch.addcmul(drive[:, 2 * size :], gates[:, :size], product).tanh_()
        h = torch.lerp(candidate, h, gates[:, size:], out=new)


@dataclass(frozen=True)
class _Layer:
    weight_ih: Tensor
    weight_hh: Tensor
    #: what is added to U x, with that of W h but for a GRU's candidate, whose product the reset gate multiplies too
    bias: Tensor
    candidate_bias: Tensor
    ceiling: Tensor | None

    def compiled(self, kind: str) -> kernels.Recurrence:
        bias = torch.cat([self.bias, self.candidate_bias]) if kind == "gru" else self.bias
        return kernels.Recurrence(kind, self.weight_ih, self.weight_hh, bias, self.ceiling)


def _kind_of(module: nn.Module) -> str:
    return str(getattr(module, "cell_kind", getattr(module, "mode", ""))).lower()


def _layer_weights(module: nn.Module, index: int, kind: str) -> _Layer:
    def tensor(name: str) -> Tensor:
        return getattr(module, f"{name}_l{index}").detach()

    weight_ih, weight_hh = tensor("weight_ih"), tensor("weight_hh")
    size = weight_hh.shape[1]
    bias, candidate_bias = weight_hh.new_zeros(len(weight_hh)), weight_hh.new_zeros(size)
    if module.bias:
        recurrent_bias = tensor("bias_hh").clone()
        if kind == "gru":
            candidate_bias = recurrent_bias[2 * size :].clone()
            recurrent_bias[2 * size :] = 0
        bias = tensor("bias_ih") + recurrent_bias
    ceiling = tensor("forget_ceiling") if kind == "scaled-gate-lstm" else None
    return _Layer(weight_ih, weight_hh, bias, candidate_bias, ceiling)


def choose_engine(plain: ModuleEngine, x: Tensor, differentiable: bool) -> Engine:
    """The fastest engine that gives what is asked: the module itself wherever gradients or another device are."""
    module = plain.module
    if differentiable or x.device.type != "cpu" or not LoopEngine.takes(module, x.dtype):
        return plain
    return LoopEngine(module)


def refuse_dropout(module: nn.Module) -> None:
    """Raise `InputError` where dropout between the layers is on."""
    if drops_out(module):
        raise InputError("dropout between the layers makes every run different: call module.eval() first")


def drops_out(module: nn.Module) -> bool:
    """Whether dropout between the layers is on; what a module of one's own calls so may be a layer."""
    dropout = getattr(module, "dropout", 0)
    between = getattr(module, "num_layers", 2) != 1
    return bool(module.training and between and isinstance(dropout, int | float) and dropout > 0)


@torch.no_grad()
def largest_sum(module: nn.Module, x: Tensor, hidden: float) -> float:
    """The size, √Σ (U x)² + (W h)² + b², of the sums that a layer's steps form; they round in proportion to it.

    The largest of any unit, for inputs as large as the largest of x and hidden states up to `hidden`; 0 of a user's own
    module.
    """
    if not is_stock(module):
        return 0.0
    low, high = x.detach().aminmax()
    inputs, largest = max(-low.item(), high.item()), 0.0
    depth: int = module.num_layers  # type: ignore[assignment]
    for index in range(depth):
        layer = _layer_weights(module, index, _kind_of(module))
        squares = inputs**2 * layer.weight_ih.square().sum(1) + hidden**2 * layer.weight_hh.square().sum(1)
        largest, inputs = max(largest, (squares + layer.bias.square()).max().sqrt().item()), hidden
    return largest


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
    for known in (_batched, _sequential, _seen):
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
