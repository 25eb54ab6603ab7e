"""Replace a recurrent layer by a feed-forward network: the same weights, unrolled over the last k inputs only.

`windowed_reference` runs the module itself once for every output; `Truncated` gives the same numbers from one batch of
windows, with the input product shared by all windows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unrecurrent.engines import refuse_dropout
from unrecurrent.errors import InputError, is_whole
from unrecurrent.self_keeping import SelfKeeping
from unrecurrent.stock import is_stock, is_traced, is_transformed

State = tuple[Tensor, ...]

_BLOCK_NUMBERS = 1 << 21  # gate values a block of windows may hold at a time


def windowed_reference(module: nn.Module, x: Tensor, k: int) -> Tensor:
    """The plain reference: for every t, `module` from the zero state over inputs t-k+1 … t of x (T, B, ...).

    `module` is any causal module with `nn.LSTM`'s call, time first. The sum of its work is k times that of one pass.
    """
    return torch.cat([module(x[max(0, t - k + 1) : t + 1])[0][-1:] for t in range(len(x))])


class Truncated(nn.Module):
    """A recurrent stack without recurrence: y_t = h_t of the last layer, started from zeros k inputs back.

    Made by `truncate`. It shares the parameters of `module`, so training one trains the other. `receptive_field` is k.
    Three views give the same numbers: `forward` on whole sequences (those no longer than k are one pass of `module`,
    since all their windows begin where they do); from `init_cache`, which is k partial windows, so that each input is
    read once, `advance` on their pieces and `step` on one input after the other.
    """

    def __init__(self, module: nn.Module, k: int) -> None:
        super().__init__()
        self.module = module
        self.receptive_field = k
        self.batch_first = bool(getattr(module, "batch_first", False))
        self.kind = _kind(module)
        self.hidden_size, self.num_layers = int(module.hidden_size), int(module.num_layers)  # type: ignore[arg-type]
        self.has_cell_state = self.kind in ("LSTM", "scaled-gate-lstm")

    def extra_repr(self) -> str:
        return f"k={self.receptive_field}"

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (T, B, H) for inputs (T, B, D); (B, T, ·) with `batch_first`, (T, ·) without a batch."""
        self._check(x)
        steps = x.shape[1 if self.batch_first and x.dim() == 3 else 0]
        if not is_transformed(x) and steps <= self.receptive_field and is_stock(self.module):
            return self.module(x)[0]  # windows that all begin where x does are one pass of the module
        if x.dim() == 2:
            return self._advance(x[:, None], self.init_cache(1))[0].squeeze(1)
        return self.advance(x, self.init_cache(x.shape[0 if self.batch_first else 1]))[0]

    def advance(self, x: Tensor, cache: list[State]) -> tuple[Tensor, list[State]]:
        """Outputs for one more piece of the sequences, (T, B, D) or with `batch_first` (B, T, D), and the new cache."""
        self._check(x, dims=(3,))
        if not self.batch_first:
            return self._advance(x, cache)
        y, cache = self._advance(x.transpose(0, 1), cache)
        return y.transpose(0, 1), cache

    def _check(self, x: Tensor, dims: tuple[int, ...] = (2, 3)) -> None:
        self._prepare()
        width = self.module.input_size
        if x.dim() not in dims or x.shape[-1] != width or not x.numel():
            raise InputError(f"x has shape {tuple(x.shape)}: give (T, B, {width}) or (T, {width}), not empty")

    def _prepare(self) -> None:
        refuse_dropout(self.module)
        if isinstance(self.module, SelfKeeping):
            self.module.keep_before_use()  # as its own forward would: weights are read past it here

    def _advance(self, x: Tensor, cache: list[State]) -> tuple[Tensor, list[State]]:
        """All steps at once, or in blocks that bound the memory."""
        if is_traced():
            return self._read(x, cache)
        count = max(1, _BLOCK_NUMBERS // (x.shape[1] * _weight(self.module, "weight_ih", 0).shape[0]))
        outputs = []
        for part in x.split(count):
            read = self._read if len(part) >= self.receptive_field else self._read_stepwise
            if torch.is_grad_enabled() and len(x) > count:  # keep one block's steps in memory, not all
                y, cache = checkpoint(read, part, cache, use_reentrant=False)
            else:
                y, cache = read(part, cache)
            outputs.append(y)
        return torch.cat(outputs), cache

    def _read(self, x: Tensor, cache: list[State]) -> tuple[Tensor, list[State]]:
        """k passes over all steps: in pass i, row t is the state of the i inputs before t, and reads input t.

        The rows move on by one between passes; the one that comes in is the cached window of the i inputs before x.
        """
        drive = self._drive(0, x)
        states, after = self._zeros(drive), []
        for age in range(self.receptive_field):
            after.append([tuple(part[-1] for part in state) for state in states])
            before = [tuple(part[age : age + 1] for part in state) for state in cache]
            states = [
                tuple(torch.cat([first, part])[:-1] for first, part in zip(*pair, strict=True))
                for pair in zip(before, states, strict=True)
            ]
            states = self._step(drive, states)
        layers = zip(*after, strict=True)
        return states[-1][-1], [tuple(torch.stack(parts) for parts in zip(*layer, strict=True)) for layer in layers]

    def _read_stepwise(self, x: Tensor, cache: list[State]) -> tuple[Tensor, list[State]]:
        """The same in as many passes as there are steps, each over all k windows."""
        outputs = []
        for x_t in x:
            y_t, cache = self.step(x_t, cache)
            outputs.append(y_t)
        return torch.stack(outputs), cache

    def _zeros(self, drive: Tensor) -> list[State]:
        part = drive.new_zeros(*drive.shape[:-1], self.hidden_size)
        state: State = (part, part) if self.has_cell_state else (part,)
        return [state] * self.num_layers

    def _step(self, drive: Tensor, states: list[State]) -> list[State]:
        """One step of every layer; each reads the new hidden state of the layer below."""
        new: list[State] = []
        for layer, state in enumerate(states):
            if layer:
                drive = self._drive(layer, new[-1][-1])
            new.append(_STEPS[self.kind](self.module, layer, drive, state))
        return new

    def _drive(self, layer: int, x: Tensor) -> Tensor:
        """U x + b, with the recurrent bias as well wherever that only adds to it (not in the GRU)."""
        bias = _weight(self.module, "bias_ih", layer)
        if bias is not None and self.kind != "GRU":
            bias = bias + _weight(self.module, "bias_hh", layer)
        return nn.functional.linear(x, _weight(self.module, "weight_ih", layer), bias)

    def init_cache(self, batch: int) -> list[State]:
        """The cache before the first input: k partial windows, the i-th to hold the last i inputs, all at zero."""
        like = _weight(self.module, "weight_hh", 0)
        return self._zeros(like.new_zeros(self.receptive_field, batch, 1))

    def step(self, x: Tensor, cache: list[State]) -> tuple[Tensor, list[State]]:
        """The output (B, H) after one more input (B, D), and the new cache: each window grows by x, the oldest goes."""
        self._prepare()
        states = self._step(self._drive(0, x), cache)
        return states[-1][-1][-1], [
            tuple(nn.functional.pad(part[:-1], (0, 0, 0, 0, 1, 0)) for part in state) for state in states
        ]


def truncate(module: nn.Module, k: int) -> Truncated:
    """A feed-forward `nn.Module` whose output at t depends on exactly the last k inputs of the whole stack.

    y_t is what `module` gives when started from the zero state at input t-k+1 (at input 0 while t < k). It shares the
    module's parameters, has gradients, a dynamic time axis under `torch.export`, and exports to ONNX without RNN, LSTM,
    GRU, Loop or Scan. With k at least `certify(module).horizon(eps)` every output is within eps of the recurrent one
    (Miller and Hardt, arXiv:1805.10369, proposition 2; docs/parallel.md).

    `module`: `nn.RNN`, `nn.LSTM`, `nn.GRU` or `StableLSTM`, in one direction, in evaluation mode if it has dropout.
    Raises `InputError` for anything else and for k < 1.

    >>> import torch
    >>> lstm = torch.nn.LSTM(3, 8)
    >>> x = torch.randn(20, 2, 3)
    >>> y = truncate(lstm, k=5)(x)
    >>> bool(torch.allclose(y[9], lstm(x[5:10])[0][-1], atol=1e-6))
    True
    """
    if not (is_whole(k) and k >= 1):
        raise InputError(f"k is {k!r}: give the number of inputs each output may depend on, at least 1")
    if getattr(module, "bidirectional", False):
        raise InputError("a bidirectional layer reads the future: truncate needs a causal one, one direction")
    if getattr(module, "proj_size", 0):
        raise InputError("projected LSTM states (proj_size) are not supported: use proj_size=0 and a linear layer")
    refuse_dropout(module)
    return Truncated(module, int(k))


def _kind(module: nn.Module) -> str:
    kind = getattr(module, "cell_kind", None) or (module.mode if isinstance(module, nn.RNNBase) else None)
    if kind not in _STEPS:
        raise InputError(f"{type(module).__name__} is not an nn.RNN, nn.LSTM, nn.GRU or StableLSTM: give one of those")
    if not is_stock(module):
        raise InputError(
            f"{type(module).__name__} has a forward or hooks of its own, which truncate would leave out: give the plain"
            " layer"
        )
    return kind


def _weight(module: nn.Module, name: str, layer: int) -> Any:
    return getattr(module, f"{name}_l{layer}", None) if not name.startswith("bias") or module.bias else None


def _recur(module: nn.Module, layer: int, h: Tensor, bias: Tensor | None = None) -> Tensor:
    return nn.functional.linear(h, _weight(module, "weight_hh", layer), bias)


def _rnn_tanh(module: nn.Module, layer: int, drive: Tensor, state: State) -> State:
    return (torch.tanh(drive + _recur(module, layer, state[0])),)


def _rnn_relu(module: nn.Module, layer: int, drive: Tensor, state: State) -> State:
    return (torch.relu(drive + _recur(module, layer, state[0])),)


def _gru(module: nn.Module, layer: int, drive: Tensor, state: State) -> State:
    (h,) = state
    drive_r, drive_z, drive_n = drive.chunk(3, -1)
    pre_r, pre_z, pre_n = _recur(module, layer, h, _weight(module, "bias_hh", layer)).chunk(3, -1)
    n = torch.tanh(drive_n + torch.sigmoid(drive_r + pre_r) * pre_n)
    return (n + torch.sigmoid(drive_z + pre_z) * (h - n),)


def _lstm(module: nn.Module, layer: int, drive: Tensor, state: State) -> State:
    c, h = state
    i, f, z, o = (drive + _recur(module, layer, h)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    return c, torch.sigmoid(o) * torch.tanh(c)


def _scaled_gate_lstm(module: nn.Module, layer: int, drive: Tensor, state: State) -> State:
    c, h = state
    pre_f, z, o = (drive + _recur(module, layer, h)).chunk(3, -1)
    f = getattr(module, f"forget_ceiling_l{layer}") * torch.sigmoid(pre_f)
    c = f * c + (1 - f) * torch.tanh(z)
    return c, torch.sigmoid(o) * torch.tanh(c)


_STEPS: dict[str, Callable[[nn.Module, int, Tensor, State], State]] = {
    "RNN_TANH": _rnn_tanh,
    "RNN_RELU": _rnn_relu,
    "GRU": _gru,
    "LSTM": _lstm,
    "scaled-gate-lstm": _scaled_gate_lstm,
}
