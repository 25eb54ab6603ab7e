"""`StableLSTM`: an LSTM with coupled gates and a ceiling on its forget gate that contracts at a stated rate.

Beside the fast paths (`_Recurrence`: all inputs in one product, one product a step, weight gradients in one product;
without gradients `_loop`: all steps in one call of C) stands their plain reference (`reference`), which is also what
`torch.compile`, `torch.export` and ONNX export see.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from unrecurrent import kernels, onednn
from unrecurrent.errors import InputError, as_number, is_whole
from unrecurrent.feasible import ScaledGate, fit_norm_, highest_ceiling, hold_rows_
from unrecurrent.projections import HALF, check_finite, widened, write_back_
from unrecurrent.self_keeping import SelfKeeping, check_norm, checked_rate, target
from unrecurrent.stock import is_transformed

# The ceilings F̄ of a layer leave the candidate's rows between these shares of the rate: (λ − F̄) / (1 − F̄) = share · λ.
CEILING_SHARES = (0.25, 0.75)
# Of its budget, a new layer uses this share at most.
INITIAL_USAGE = 0.5
# Laying out so many numbers of the weights for `_loop` costs about what a step in it spares.
LAID_OUT_A_STEP = 50_000
# Matrices of more units leave the cache between two steps, and then the multiplication routine is as fast.
MOST_UNITS = 600
# Of fewer rows, or of inputs so many times as wide as the state, the product with the inputs is made of all steps at
# once: weights are read once, not once a step.
FEW_ROWS, WIDE = 6, 2


def reference(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, ceiling: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one layer step by step, in ordinary operations: the outputs `(T, B, H)` and the last c `(B, H)`.

    f = F̄ σ(a_f), z = tanh(a_z), o = σ(a_o) with a = U x + W h + b; c ← f c + (1 − f) z, h ← o tanh(c).
    """
    outputs = []
    for drive in nn.functional.linear(x, weight_ih, bias).unbind(0):
        gate_f, gate_z, gate_o = (drive + nn.functional.linear(h, weight_hh)).chunk(3, -1)
        f = ceiling * torch.sigmoid(gate_f)
        c = f * c + (1 - f) * torch.tanh(gate_z)
        h = torch.sigmoid(gate_o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs), c


class _Product:
    """x ↦ x Wᵀ for one W and many x, W laid out once for the multiplication routine."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.packed = onednn.has_onednn(weight)
        self.weight = onednn.packed(weight, rows) if self.packed else weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return onednn.product(x, self.weight)
        return x @ self.weight

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """x Wᵀ + other."""
        if self.packed:
            return onednn.product_plus(x, self.weight, other)
        return torch.addmm(other, x, self.weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, once."""
    if onednn.has_onednn(weight):
        return onednn.product(x, weight)
    return x @ weight.t()


class _Recurrence(torch.autograd.Function):
    """`reference`, fast: forward and backward do one matrix product and one pass over the gates a step."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        ceiling: Tensor,
        h0: Tensor,
        c0: Tensor,
    ) -> tuple[Tensor, Tensor]:
        steps, batch, width = x.shape
        size = h0.shape[-1]
        drive = _product(x.reshape(-1, width), weight_ih)
        if bias is not None:
            drive += bias
        drives = drive.view(steps, batch, 3 * size)
        gates, squashed = torch.empty_like(drives), drive.new_empty(steps, batch, size)
        outputs, cells = torch.empty_like(squashed), drive.new_empty(steps + 1, batch, size)
        cells[0] = c0
        recurrent, h, c, ceiling = _Product(weight_hh, batch), h0.contiguous(), cells[0], ceiling.contiguous()
        pass_gates = _compiled_or(_gates_reference, "gates", c)
        for drive_t, gates_t, squashed_t, output, cell in zip(
            drives.unbind(0), gates.unbind(0), squashed.unbind(0), outputs.unbind(0), cells[1:].unbind(0), strict=True
        ):
            pass_gates(recurrent.plus(h, drive_t), ceiling, c, gates_t, squashed_t, output, cell)
            h, c = output, cell
        ctx.save_for_backward(x, weight_ih, weight_hh, bias, ceiling, h0, c0, gates, squashed, outputs, cells)
        return outputs, cells[-1].clone()

    @staticmethod
    def backward(ctx: Any, *d_results: Tensor) -> tuple[Tensor | None, ...]:
        # These gradients are to be differentiated again (create_graph=True), or asked for many at once.
        if torch.is_grad_enabled() or any(map(is_transformed, d_results)):
            return _reference_gradients(ctx.saved_tensors[:7], ctx.needs_input_grad, d_results)
        d_outputs, d_last = d_results
        x, weight_ih, weight_hh, bias, ceiling, h0, _, gates, squashed, outputs, cells = ctx.saved_tensors
        d_gates, d_h0, d_c0 = _backward_through_time(d_outputs, d_last, weight_hh, gates, squashed, cells, ceiling)
        flat, needs = d_gates.flatten(0, 1), ctx.needs_input_grad
        across = flat.t().contiguous()
        before = torch.cat((h0.unsqueeze(0), outputs[:-1])).flatten(0, 1)
        d_x = _product(flat, weight_ih.t().contiguous()).view_as(x) if needs[0] else None
        d_ih = _product(across, x.flatten(0, 1).t().contiguous()) if needs[1] else None
        d_hh = _product(across, before.t().contiguous()) if needs[2] else None
        return d_x, d_ih, d_hh, flat.sum(0) if bias is not None else None, None, d_h0, d_c0


def _loop(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, ceiling: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference` without gradients, in one call of `recurrence.c`; only for what `_suits_loop` accepts."""
    driven, bias = _drives_first(x, weight_hh), weight_hh.new_zeros(len(weight_hh)) if bias is None else bias
    layer = kernels.Recurrence("scaled-gate-lstm", None if driven else weight_ih, weight_hh, bias, ceiling)
    y, cell = x.new_empty(*x.shape[:2], h.shape[-1]), c.clone(memory_format=torch.contiguous_format)
    layer.run(nn.functional.linear(x, weight_ih, bias) if driven else x, h.resolve_neg().contiguous(), cell, y)
    return y, cell


def _drives_first(x: Tensor, weight_hh: Tensor) -> bool:
    return x.shape[1] < FEW_ROWS or x.shape[-1] > WIDE * weight_hh.shape[-1]


def _suits_loop(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None, ceiling: Tensor, h: Tensor, c: Tensor
) -> bool:
    """Whether `_loop` may and should take these: no gradient is wanted, and all are what the C code reads.

    It is asked of the tensors that are multiplied, which need not be the layer's parameters.
    """
    size = h.shape[-1]
    laid_out = 3 * size * (size + (0 if _drives_first(x, weight_hh) else x.shape[-1]))
    if size > MOST_UNITS or laid_out > x.shape[0] * LAID_OUT_A_STEP or not kernels.Recurrence.takes(x.dtype):
        return False
    given = [x, weight_ih, weight_hh, ceiling, h, c] + ([] if bias is None else [bias])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype is torch.float32 for t in given)


def _compiled_or(plain: Callable[..., None], name: str, like: Tensor) -> Callable[..., None]:
    """The compiled function of that name where it takes cells like this one, else the plain one."""
    compiled = kernels.gates(like)
    return plain if compiled is None else partial(kernels.call_gated, getattr(compiled, name), like)


def _gates_reference(
    raw: Tensor, ceiling: Tensor, before: Tensor, gates: Tensor, squashed: Tensor, output: Tensor, cell: Tensor
) -> None:
    """From the pre-activations of a step `(B, 3 H)` and the cell before it: gates, cell, its tanh, and output."""
    (raw_f, raw_z, raw_o), (f, z, o) = raw.chunk(3, -1), gates.chunk(3, -1)
    torch.mul(torch.sigmoid(raw_f, out=f), ceiling, out=f)
    torch.lerp(torch.tanh(raw_z, out=z), before, f, out=cell)
    torch.mul(torch.sigmoid(raw_o, out=o), torch.tanh(cell, out=squashed), out=output)


def _slopes_reference(
    d_output: Tensor, gates: Tensor, squashed: Tensor, before: Tensor, ceiling: Tensor, d_cell: Tensor, d_raw: Tensor
) -> None:
    """From the slope in the output of a step: that in its pre-activations; `d_cell` becomes that in the cell before."""
    (f, z, o), (d_f, d_z, d_o) = gates.chunk(3, -1), d_raw.chunk(3, -1)
    d_cell.addcmul_(d_output, o * (1 - squashed * squashed))
    torch.mul(d_cell * (before - z), f * (1 - f / ceiling), out=d_f)
    torch.mul(d_cell * (1 - f), 1 - z * z, out=d_z)
    torch.mul(d_output * squashed, o * (1 - o), out=d_o)
    d_cell.mul_(f)


def _backward_through_time(
    d_outputs: Tensor,
    d_last: Tensor,
    weight_hh: Tensor,
    gates: Tensor,
    squashed: Tensor,
    cells: Tensor,
    ceiling: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of all pre-activations `(T, B, 3 H)`, of h0 and of c0."""
    batch = d_outputs.shape[1]
    d_gates, d_c = torch.empty_like(gates), d_last.clone(memory_format=torch.contiguous_format)
    back, d_outputs_ = _Product(weight_hh.t().contiguous(), batch), d_outputs.contiguous().unbind(0)
    pass_slopes, d_h = _compiled_or(_slopes_reference, "slopes", d_c), d_outputs_[-1]
    steps = zip(gates.unbind(0), squashed.unbind(0), cells[:-1].unbind(0), d_gates.unbind(0), strict=True)
    for t, (gates_t, squashed_t, before, d_step) in reversed(list(enumerate(steps))):
        pass_slopes(d_h, gates_t, squashed_t, before, ceiling, d_c, d_step)
        d_h = back.plus(d_step, d_outputs_[t - 1]) if t else back(d_step)
    return d_gates, d_h, d_c


def _reference_gradients(
    inputs: Sequence[Tensor | None], needed: Sequence[bool], d_results: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients through `reference`, as functions that can be differentiated again where gradients are on."""
    again = torch.is_grad_enabled()
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need and t is not None]
    with torch.enable_grad():
        results = reference(*inputs)  # type: ignore[arg-type]
    gradients = iter(torch.autograd.grad(results, wanted, d_results, create_graph=again))
    return tuple(next(gradients) if need and t is not None else None for t, need in zip(inputs, needed, strict=True))


class StableLSTM(SelfKeeping):
    """An LSTM with coupled gates whose forget gate has a ceiling F̄ < 1; it contracts at `rate` whatever it reads.

        f = F̄ σ(U_f x + W_f h + b_f)      z = tanh(U_z x + W_z h + b_z)      o = σ(U_o x + W_o h + b_o)
        c ← f c + (1 − f) z               h ← o tanh(c)

    Same call, shapes and state as `nn.LSTM`, and accepted wherever that is. The ceilings, and budgets for the row sums
    of W unit by unit, make `certify(layer).rate` at most `rate` for all inputs, after every optimizer step and however
    it was trained; U and b stay free. Source: docs/stability.md.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, device, dtype: as for `nn.LSTM`.
        rate: bound on the contraction factor a step, between 0 and 1: a factor e is forgotten in 1 / (1 − rate) steps.
        bidirectional, proj_size: `nn.LSTM` has them, this layer does not.

    Shapes: x `(T, B, D)`, `(B, T, D)` with `batch_first`, `(T, D)` without batch, or a `PackedSequence`; h0 and c0
    `(num_layers, B, H)`, default zeros. Parameters `weight_ih_l{k}` `(3 H, D)`, `weight_hh_l{k}` `(3 H, H)`,
    `bias_ih_l{k}`, `bias_hh_l{k}` `(3 H,)` with rows in the order f, z, o; buffers `forget_ceiling_l{k}` `(H,)` and
    `norm_l{k}` `(2, H)`, the weights of c and h in the norm in which the layer contracts.

    Raises:
        InputError: a rate outside (0, 1), sizes below 1, bidirectional, proj_size, or inputs and states of the wrong
            kind, shape or dtype.

    >>> lstm = StableLSTM(3, 5, num_layers=2, rate=0.9)
    >>> y, (h, c) = lstm(torch.randn(7, 4, 3))
    >>> y.shape, h.shape, c.shape
    (torch.Size([7, 4, 5]), torch.Size([2, 4, 5]), torch.Size([2, 4, 5]))
    """

    cell_kind = "scaled-gate-lstm"
    bidirectional = False
    proj_size = 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        rate: float = 0.98,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        rate = checked_rate(rate)
        if bidirectional:
            raise InputError("StableLSTM runs forward in time only: leave out bidirectional")
        if proj_size:
            raise InputError("StableLSTM has no projection: leave out proj_size, and put an nn.Linear behind it")
        sizes = (input_size, hidden_size, num_layers)
        if not all(is_whole(size) and size >= 1 for size in sizes):
            raise InputError(f"input_size, hidden_size and num_layers must be whole numbers of at least 1, got {sizes}")
        chance = as_number(dropout)
        if chance is None or not 0 <= chance <= 1:
            raise InputError(f"dropout must be a probability between 0 and 1, got {dropout!r}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.rate = bias, batch_first, chance, rate
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        for k in range(num_layers):
            width = input_size if k == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{k}", nn.Parameter(torch.empty(3 * hidden_size, width, **like)))
            self.register_parameter(f"weight_hh_l{k}", nn.Parameter(torch.empty(3 * hidden_size, hidden_size, **like)))
            for name in ("bias_ih", "bias_hh"):
                value = nn.Parameter(torch.empty(3 * hidden_size, **like)) if bias else None
                self.register_parameter(f"{name}_l{k}", value)
            exactly = {**like, "dtype": torch.float32 if dtype in HALF else dtype}
            shares = rate * torch.linspace(*CEILING_SHARES, hidden_size, **exactly)
            self.register_buffer(f"forget_ceiling_l{k}", ((rate - shares) / (1 - shares)).to(dtype))
            self.register_buffer(f"norm_l{k}", torch.ones(2, hidden_size, **like))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters uniformly in ±1/√H as `nn.LSTM` does, then scale the rows of W to half their budgets."""
        self._lower_ceilings()
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -(self.hidden_size**-0.5), self.hidden_size**-0.5)
        for weight, budget, norm in self._rows():
            norm.fill_(1.0)
            size = self.hidden_size
            usage = budget.gain(weight.abs().view(3, size, size).sum(-1)[[1, 0]])
            weight[: 2 * size] *= (INITIAL_USAGE / usage).clamp_max(1).repeat(2)[:, None]
            limit = INITIAL_USAGE * budget.output_budget(norm)
            weight[2 * size :] *= (limit / weight[2 * size :].abs().sum(-1)).clamp_max(1)[:, None]
        self.project()

    @property
    def known_norms(self) -> list[Tensor]:
        """The norms in which the layers contract, where `certify` begins its search."""
        return [self.get_buffer(f"norm_l{k}") for k in range(self.num_layers)]

    def _rows(self) -> list[tuple[Tensor, ScaledGate, Tensor]]:
        """Of each layer the recurrent weight, its budgets and its norm."""
        rows: list[tuple[Tensor, ScaledGate, Tensor]] = []
        for k in range(self.num_layers):
            ceiling, norm = widened(self.get_buffer(f"forget_ceiling_l{k}")), self.get_buffer(f"norm_l{k}")
            rows.append((self.get_parameter(f"weight_hh_l{k}"), ScaledGate(target(self.rate), ceiling), norm))
        return rows

    def _check_loaded(self, name: str, loaded: Tensor) -> None:
        if name.startswith("norm"):
            check_norm(loaded, name)
        elif name.startswith("forget_ceiling"):
            if not bool((loaded >= 0).all()):
                raise InputError(f"{name} must hold ceilings of at least 0: these weights are damaged")
            if float(loaded.max()) >= target(self.rate):
                raise InputError(f"these weights belong to a StableLSTM of a higher rate than {self.rate}: use theirs")

    def _project(self) -> None:
        self._lower_ceilings()
        check_finite(*self.parameters(recurse=False))
        self._hold()

    def _lower_ceilings(self) -> None:
        """In half precision rounding may have brought a ceiling up to the rate: bring it back below."""
        for k in range(self.num_layers):
            ceiling = self.get_buffer(f"forget_ceiling_l{k}")
            if ceiling.dtype in HALF:
                write_back_(ceiling, ceiling.float().clamp_max(highest_ceiling(self.rate)))

    def _hold(self) -> None:
        for weight, budget, norm in self._rows():
            hold_rows_(weight, budget, norm)

    def _adapt(self) -> None:
        for weight, budget, norm in self._rows():
            fit_norm_(weight, budget, norm)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """The outputs of the last layer, and (h, c) of all layers after the last step."""
        self.keep_before_use()
        if isinstance(input, PackedSequence):
            self._check_dtype("input", input.data)
            return self._forward_packed(input, hx)
        if not isinstance(input, Tensor):
            raise InputError(f"StableLSTM reads a tensor or a PackedSequence, not {type(input).__name__}")
        self._check_dtype("input", input)
        if input.dim() not in (2, 3) or input.shape[-1] != self.input_size or 0 in input.shape:
            raise InputError(
                f"StableLSTM reads (T, B, {self.input_size}), batch_first (B, T, {self.input_size}), or (T, "
                f"{self.input_size}), none of them empty, but got a tensor of shape {tuple(input.shape)}"
            )
        batched = input.dim() == 3
        x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
        y, h, c = self._run(x, *self._start(x, hx, batched))
        if not batched:
            return y.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, (h, c)

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        """Raise `InputError` for a tensor of another dtype than the weights; autocast casts both as it sees fit."""
        dtype = self.weight_ih_l0.dtype
        if tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise InputError(
                f"{name} is {tensor.dtype}, but the layer's weights are {dtype}: call .to() on one of them"
            )

    def _start(self, x: Tensor, hx: tuple[Tensor, Tensor] | None, batched: bool) -> tuple[Tensor, Tensor]:
        shape = (self.num_layers, x.shape[1], self.hidden_size)
        if hx is None:
            zeros = x.new_zeros(shape)
            return zeros, zeros
        if not (isinstance(hx, tuple | list) and [isinstance(part, Tensor) for part in hx] == [True, True]):
            raise InputError("the start state of StableLSTM is a pair of tensors (h0, c0): give it in that form")
        h, c = hx if batched else (part.unsqueeze(1) for part in hx)
        self._check_dtype("h0", h)
        self._check_dtype("c0", c)
        if h.shape != shape or c.shape != shape:
            raise InputError(f"h0 and c0 must have shape {shape}, but got {tuple(h.shape)} and {tuple(c.shape)}")
        return h, c

    def _run(self, x: Tensor, h0: Tensor, c0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All layers over `(T, B, D)`: outputs, and h and c of each layer at the end."""
        plain, h_last, c_last = is_transformed(x), [], []
        for k in range(self.num_layers):
            if k and self.dropout:
                x = nn.functional.dropout(x, self.dropout, self.training)
            given = (x, *self._weights(k), h0[k], c0[k])
            run = reference if plain else _loop if _suits_loop(*given) else _Recurrence.apply
            x, c = run(*given)
            h_last.append(x[-1])
            c_last.append(c)
        return x, torch.stack(h_last), torch.stack(c_last)

    def _weights(self, k: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Of layer k U, W, the sum of both biases, and F̄; C code reads as much of them as it expects there."""
        bias = getattr(self, f"bias_ih_l{k}") + getattr(self, f"bias_hh_l{k}") if self.bias else None
        weight_ih, weight_hh = getattr(self, f"weight_ih_l{k}"), getattr(self, f"weight_hh_l{k}")
        ceiling, size = getattr(self, f"forget_ceiling_l{k}"), self.hidden_size
        given = (weight_ih, weight_hh, ceiling) if bias is None else (weight_ih, weight_hh, ceiling, bias)
        found = [tuple(tensor.shape) for tensor in given]
        wanted = [(3 * size, self.input_size if k == 0 else size), (3 * size, size), (size,), (3 * size,)][: len(given)]
        if found != wanted:
            raise InputError(f"layer {k} has weights, ceiling and bias of shapes {found}: they must be {wanted}")
        return weight_ih, weight_hh, bias, ceiling

    def _forward_packed(
        self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]:
        """Sequences of different lengths, longest first: runs of steps in which the same sequences are still going."""
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        h, c = self._start(x, hx, batched=True)
        if packed.sorted_indices is not None:
            h, c = h[:, packed.sorted_indices], c[:, packed.sorted_indices]
        outputs, begin = [], 0
        for end in sorted(set(lengths.tolist())):
            going = int((lengths >= end).sum())
            y, h_going, c_going = self._run(x[begin:end, :going], h[:, :going], c[:, :going])
            h, c = torch.cat((h_going, h[:, going:]), 1), torch.cat((c_going, c[:, going:]), 1)
            outputs.append(y.flatten(0, 1))
            begin = end
        if packed.unsorted_indices is not None:
            h, c = h[:, packed.unsorted_indices], c[:, packed.unsorted_indices]
        return packed._replace(data=torch.cat(outputs)), (h, c)

    def flatten_parameters(self) -> None:
        """There is nothing to flatten; here because `nn.LSTM` has it."""

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, rate={self.rate}"
        return text + f", bias={self.bias}, batch_first={self.batch_first}, dropout={self.dropout}"
