"""The error propagators of docs/certificates.md in their plain, symmetric form, which `certify` must never be behind.

Written apart from the library: one maximum a term, symmetric bounds on the state, damped iteration on the whole stack.
"""

import functools
import math

import torch
from torch import Tensor, nn


def _magnitude(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(low.abs(), high.abs())


def _range(drive: tuple[Tensor, Tensor], spread: Tensor) -> tuple[Tensor, Tensor]:
    return drive[0] - spread, drive[1] + spread


def _gate(drive: tuple[Tensor, Tensor], spread: Tensor) -> tuple[Tensor, Tensor]:
    low, high = _range(drive, spread)
    return low.sigmoid(), high.sigmoid()


def _max_gate(gate: tuple[Tensor, Tensor], a: Tensor, b: Tensor, ceiling: Tensor | float = 1.0) -> Tensor:
    low, high = gate
    values = [f * a + f * (1 - f / ceiling) * b for f in (low, high)]
    f = torch.where(b > 0, ceiling * (a + b) / (2 * b).clamp_min(1e-300), low)
    f = torch.minimum(torch.maximum(f, low), high)
    values.append(f * a + f * (1 - f / ceiling) * b)
    return torch.stack(values).amax(0)


def _slope(low: Tensor, high: Tensor) -> Tensor:
    return 1 - torch.tanh(torch.maximum(low, -high).clamp_min(0)) ** 2


class PlainLayer:
    """One layer: invariant bounds `bound` and propagator `propagate(e, input_error)`, e in the order (c, h)."""

    def __init__(self, kind: str, weights: list[Tensor], drive: tuple[Tensor, Tensor], extra: Tensor | None = None):
        self.kind, self.extra = kind, extra
        self.u, self.w = weights[0].double().abs(), weights[1].double().abs()
        self.hidden = self.w.shape[1]
        gates = self.w.shape[0] // self.hidden
        self.drives = list(zip(drive[0].chunk(gates), drive[1].chunk(gates), strict=True))
        getattr(self, "_bound_" + kind)()

    def spread(self, h: Tensor) -> tuple[Tensor, ...]:
        return (self.w @ h).split(self.hidden)

    def propagate(self, e: Tensor, input_error: Tensor | None = None) -> Tensor:
        sent = torch.zeros(len(self.w), dtype=torch.float64) if input_error is None else self.u @ input_error
        return getattr(self, "_propagate_" + self.kind)(e, sent.split(self.hidden))

    def _bound_tanh(self) -> None:
        h = torch.ones(self.hidden, dtype=torch.float64)
        for _ in range(500):
            h = torch.tanh(_magnitude(*_range(self.drives[0], self.w @ h)))
        self.bound = h
        self.slope = _slope(*_range(self.drives[0], self.w @ h))

    def _propagate_tanh(self, e: Tensor, sent: tuple[Tensor, ...]) -> Tensor:
        return self.slope * (self.w @ e + sent[0])

    def _bound_lstm(self) -> None:
        h = torch.ones(self.hidden, dtype=torch.float64)
        for _ in range(500):
            s = self.spread(h)
            self.i, self.f, self.o = (_gate(self.drives[n], s[n]) for n in (0, 1, 3))
            self.z = torch.tanh(_magnitude(*_range(self.drives[2], s[2])))
            self.c = self.i[1] * self.z / torch.sigmoid(-_range(self.drives[1], s[1])[1])
            new = self.o[1] * torch.tanh(self.c)
            if torch.equal(new, h):
                break
            h = new
        self.tau = _slope(*_range(self.drives[2], self.spread(h)[2]))
        self.bound = torch.cat([self.c, h])

    def _propagate_lstm(self, e: Tensor, sent: tuple[Tensor, ...]) -> Tensor:
        e_c, e_h = e.split(self.hidden)
        w_i, w_f, w_z, w_o = (a + b for a, b in zip(self.spread(e_h), sent, strict=True))
        e_c = _max_gate(self.f, e_c, self.c * w_f) + _max_gate(self.i, self.tau * w_z, self.z * w_i)
        return torch.cat([e_c, _max_gate(self.o, e_c, torch.tanh(self.c) * w_o)])

    def _bound_scaled(self) -> None:
        """Rows f, z, o; `extra` is the ceiling of the forget gate (1 for the coupled LSTM)."""
        assert self.extra is not None
        h = torch.ones(self.hidden, dtype=torch.float64)
        for _ in range(500):
            s = self.spread(h)
            self.c = torch.tanh(_magnitude(*_range(self.drives[1], s[1])))
            self.o = _gate(self.drives[2], s[2])
            new = self.o[1] * torch.tanh(self.c)
            if torch.equal(new, h):
                break
            h = new
        s = self.spread(h)
        self.f = tuple(self.extra * f for f in _gate(self.drives[0], s[0]))
        self.tau = _slope(*_range(self.drives[1], s[1]))
        self.bound = torch.cat([self.c, h])

    def _propagate_scaled(self, e: Tensor, sent: tuple[Tensor, ...]) -> Tensor:
        e_c, e_h = e.split(self.hidden)
        w_f, w_z, w_o = (a + b for a, b in zip(self.spread(e_h), sent, strict=True))
        n = self.tau * w_z
        e_c = n + _max_gate(self.f, e_c - n, 2 * self.c * w_f, self.extra)
        return torch.cat([e_c, _max_gate(self.o, e_c, torch.tanh(self.c) * w_o)])

    def _bound_gru(self) -> None:
        """`extra` is b_hn."""
        assert self.extra is not None
        h = torch.ones(self.hidden, dtype=torch.float64)
        s = self.spread(h)
        self.r, self.z = _gate(self.drives[0], s[0]), _gate(self.drives[1], s[1])
        self.bound, self.product = h, s[2] + self.extra.abs()

    def _propagate_gru(self, e: Tensor, sent: tuple[Tensor, ...]) -> Tensor:
        w_r, w_z, w_n = self.spread(e)
        e_n = sent[2] + _max_gate(self.r, w_n, self.product * (w_r + sent[0]))
        return e_n + _max_gate(self.z, e - e_n, 2 * (w_z + sent[1]))


class PlainStack:
    def __init__(self, layers: list[PlainLayer]):
        self.layers = layers
        self.sizes = [len(layer.bound) for layer in layers]

    def propagate(self, e: Tensor) -> Tensor:
        new, below = [], None
        for layer, part in zip(self.layers, e.split(self.sizes), strict=True):
            new.append(layer.propagate(part, below))
            below = new[-1][-layer.hidden :]
        return torch.cat(new)

    @functools.cache  # noqa: B019
    def rate(self, steps: int = 300) -> tuple[float, Tensor]:
        v = torch.ones(sum(self.sizes), dtype=torch.float64)
        best, best_v = math.inf, v
        for _ in range(steps):
            moved = self.propagate(v)
            if float(moved.max()) == 0:
                return 0.0, v
            ratio = float((moved / v).max())
            if ratio < best:
                best, best_v = ratio, v
            v = (v / 2 + moved / moved.max() / 2).clamp_min(1e-12)
        return best, best_v

    def horizon(self, eps: float, steps: int = 1000) -> int | None:
        rate, v = self.rate()
        if rate >= 1:
            return None
        e, smallest = torch.cat([layer.bound for layer in self.layers]), 0
        h = self.layers[-1].hidden
        for k in range(steps):
            if float(e[-h:].max()) > eps:
                smallest = k + 1
            elif float((e / v).max() * v[-h:].max()) <= eps:
                return smallest
            e = self.propagate(e)
        return k + 1 + math.ceil(math.log(eps / float((e / v).max() * v[-h:].max())) / math.log(rate))


def plain_stack(module: nn.Module, input_bound: float) -> PlainStack:
    """The plain propagator of an `nn.RNN` (tanh), `nn.LSTM` (coupled where tied) or `nn.GRU` for bounded inputs."""
    layers: list[PlainLayer] = []
    below = torch.full((module.input_size,), input_bound, dtype=torch.float64)
    for n in range(module.num_layers):
        weights = [getattr(module, f"{name}_l{n}").detach().double() for name in ("weight_ih", "weight_hh")]
        b_ih, b_hh = (getattr(module, f"{name}_l{n}").detach().double() for name in ("bias_ih", "bias_hh"))
        bias, extra, kind = b_ih + b_hh, None, {"RNN": "tanh", "LSTM": "lstm", "GRU": "gru"}[type(module).__name__]
        size = module.hidden_size
        if kind == "gru":
            bias, extra = torch.cat([bias[: 2 * size], b_ih[2 * size :]]), b_hh[2 * size :]
        if kind == "lstm" and all(torch.equal(w[:size], -w[size : 2 * size]) for w in (*weights, b_ih, b_hh)):
            kind, extra = "scaled", torch.ones(size, dtype=torch.float64)
            weights, bias = [w[size:] for w in weights], bias[size:]
        reach = weights[0].abs() @ below
        layers.append(PlainLayer(kind, weights, (bias - reach, bias + reach), extra))
        below = layers[-1].bound[-size:]
    return PlainStack(layers)
