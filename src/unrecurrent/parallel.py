"""Run a recurrent layer in parallel over time, and check that the answer is the sequential one.

The sequence is cut into chunks that run as one batch. Each chunk first reads `warmup` inputs from before its start,
from the zero state; the first chunk starts from the true h0. The state a chunk starts its kept part from must agree
with the end state of the chunk before it (`mismatch`), and what a wrong start state does to the outputs (`gain`) is
measured or proved. Where the check fails and cannot be mended cheaply, the user's own module runs step by step. The
plain reference is `chunked_reference`; how it all works is told in docs/parallel.md.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unrecurrent.agreement import Carry, Check
from unrecurrent.certificate import Certificate
from unrecurrent.chunks import Attempt, GiveUp, NotWorthIt, Plan, TryAPart, perturbed
from unrecurrent.engines import (
    ModuleEngine,
    State,
    choose_engine,
    doubt_step_cost,
    drops_out,
    learn_sequential_step,
    parts_of,
    refuse_dropout,
    sequential_step,
)
from unrecurrent.errors import InputError
from unrecurrent.evidence import Evidence, Options, Verify, merged, sequential_evidence
from unrecurrent.pilot import CHECKED_SHARE, decide, left_for_the_rest
from unrecurrent.stock import is_stock

_CARRY_STEPS = 16  # on which a user's module is tried
_NUMPY_TYPES = (np.float16, np.float32, np.float64)  # what outputs can be written as, in the machine's byte order
_SHORTEST = 1024  # below this many steps a pilot costs more than the chunks can save
_SPAN_BYTES = 1 << 27
_PART = 8  # what saves less than half is tried on this part of the steps first


class _Result(NamedTuple):
    y: Tensor
    state: State
    evidence: Evidence
    end_error: Tensor | None  # proved bound on the error of the end state, by component


def _attempt(plain: ModuleEngine, x: Tensor, h0: State, options: Options, carry: "Carry | None" = None) -> _Result:
    """One checked parallel run of x (T, B, ...) from h0; raises `GiveUp` where the module must run step by step."""
    begun = time.perf_counter()
    if torch.is_autocast_enabled(x.device.type):
        raise GiveUp("under autocast the module rounds too coarsely for two of its runs to be compared")
    engine = choose_engine(plain, x, _needs_gradient(plain.module, x, h0))
    try:
        with torch.no_grad():
            plan, ledger, rate = decide(engine, plain, x, options)
        attempt = Attempt(plain.module, engine, x, h0, plan, ledger)
        attempt.run()
        check = Check(attempt, options, carry or Carry())
        check.run()
    except NotWorthIt as reason:
        part_is_next = isinstance(reason, TryAPart) and carry is not None and len(x) // _PART >= _SHORTEST
        if not part_is_next:
            with torch.no_grad():
                doubt_step_cost(engine, plain, x)
        raise
    evidence = Evidence(
        mode="parallel",
        steps=len(x),
        tol=options.tol,
        verify=options.verify,
        chunks=plan.chunks,
        warmup=plan.warmup,
        sweeps=check.sweeps,
        sequential_depth=ledger.depth,
        max_mismatch=check.mismatch.max().item(),
        gain=check.gain,
        gain_chunks=check.gain_chunks,
        left=check.left,
        error_estimate=check.error,
        bound=check.bound,
        forgetting_rate=rate,
        note=check.note,
    )
    seconds = time.perf_counter() - begun
    evidence = replace(evidence, estimated_speedup=sequential_step(plain, x) * len(x) / seconds)
    return _Result(attempt.outputs(), attempt.final_state(), evidence, check.end_error)


def _attempt_of_any(plain: ModuleEngine, x: Tensor, h0: State, options: Options, carry: "Carry") -> _Result:
    """`_attempt`; a module of the user's own may fail on a batch of chunks though it takes the user's batch."""
    with _as_one_batch(plain.module):
        return _attempt(plain, x, h0, options, carry)


@contextmanager
def _as_one_batch(module: nn.Module) -> Iterator[None]:
    """Give up where a module of the user's own fails on a batch of chunks."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError) as error:
        if is_stock(module) or isinstance(error, InputError):
            raise
        raise GiveUp(f"the module does not take the chunks as one batch ({error})") from error


@torch.no_grad()
def _check_batch_of_chunks(plain: ModuleEngine, head: Tensor, h0: State, tol: float) -> None:
    """Try on the first few steps that a user's module can run as a batch of chunks.

    It must go on from its state as if it had not been interrupted, and other sequences beside must change nothing.
    """
    if is_stock(plain.module):
        return
    half = len(head) // 2
    whole, _ = plain.advance(head, h0)
    first, state = plain.advance(head[:half], h0) if half else (whole[:0], h0)
    second, _ = plain.advance(head[half:], state)
    if not float((torch.cat([first, second]) - whole).abs().max()) <= tol:
        raise GiveUp("the module's state does not carry all of its past")
    beside = torch.cat([head, head.flip(0)], dim=1)
    with _as_one_batch(plain.module):
        both, _ = plain.advance(beside, tuple(torch.cat([part, part], dim=1) for part in h0))
    if not float((both[:, : head.shape[1]] - whole).abs().max()) <= tol:
        raise GiveUp("other sequences in its batch change what the module makes of one")


def _needs_gradient(module: nn.Module, x: Tensor, h0: State) -> bool:
    """Whether gradients are asked for, backward or (with tangents on the tensors themselves) forward."""
    weights = (*module.parameters(), *getattr(module, "_flat_weights", ()))  # the latter may be computed from others
    tensors = [t for t in (x, *h0, *weights) if t is not None]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Call(NamedTuple):
    """What the user called with, and the same as (T, B, ...) with a tuple of states."""

    module: nn.Module
    original_x: Any
    original_h0: Any
    x: Any
    h0: State
    plain: ModuleEngine
    batch_first: bool
    unbatched: bool

    @classmethod
    def checked(cls, module: nn.Module, x: Any, h0: Any, options: Options) -> "_Call":
        _check_module(module)
        if not isinstance(x, Tensor | np.ndarray):
            raise InputError(f"x must be a tensor, a NumPy array or a PackedSequence, not {type(x).__name__}")
        h0 = tuple(h0) if isinstance(h0, list) else h0
        if isinstance(module, nn.RNN | nn.GRU) and not (h0 is None or isinstance(h0, Tensor)):
            raise InputError(f"h0 of {type(module).__name__} is one tensor, not a {type(h0).__name__}")
        unbatched = len(x.shape) == 2 and hasattr(module, "input_size")
        batch_first = bool(getattr(module, "batch_first", False)) and not unbatched
        _check_input(module, x, unbatched)
        given = h0
        straight = x[:, None] if unbatched else x.swapaxes(0, 1) if batch_first else x
        if h0 is not None and unbatched:
            h0 = tuple(part[:, None] for part in h0) if isinstance(h0, tuple) else h0[:, None]
        plain = ModuleEngine(module, _tensor(straight[:1]), h0)
        template = plain.zero_state(straight.shape[1])
        state = template if h0 is None else parts_of(h0)
        _check_state(state, template)
        dtype = _tensor(straight[:1]).dtype
        reads_numbers = dtype.is_floating_point or isinstance(module, nn.RNNBase)
        if reads_numbers and dtype != template[0].dtype:
            raise InputError(f"x is {dtype} but the module computes in {template[0].dtype}: convert one of them")
        floor = 16 * torch.finfo(template[0].dtype).eps
        if not options.tol >= floor:
            raise InputError(f"tol={options.tol:g} is below 16 eps ({floor:.1e}): use a larger tol or float64")
        if options.certificate is not None and not options.certificate.is_about(module):
            raise InputError("the certificate is about other weights than the module's: certify it as it stands now")
        return cls(module, x, given, straight, state, plain, batch_first, unbatched)

    def original_layout(self, y: Tensor) -> Tensor:
        return y.squeeze(1) if self.unbatched else y.transpose(0, 1) if self.batch_first else y

    def original_state(self, state: State) -> Any:
        return self.plain.pack(tuple(part.squeeze(1) for part in state) if self.unbatched else state)


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise InputError(f"the module must be an nn.Module such as nn.LSTM, not {type(module).__name__}")
    refuse_dropout(module)
    if getattr(module, "bidirectional", False) and not isinstance(module, nn.RNNBase):
        raise InputError(
            "only nn.RNN, nn.LSTM and nn.GRU can be bidirectional here: run the two directions by themselves"
        )


def _check_input(module: nn.Module, x: Any, unbatched: bool) -> None:
    shape = tuple(x.shape)
    if len(shape) < 2:
        raise InputError(f"x has shape {shape}: give (T, B, D), (B, T, D) with batch_first, or (T, D)")
    if 0 in shape:
        raise InputError(f"x has shape {shape}: give a sequence with at least one step and one input")
    width = getattr(module, "input_size", shape[-1])
    if hasattr(module, "input_size") and (len(shape) != 3 - unbatched or shape[-1] != width):
        raise InputError(f"x has shape {shape}, but the module reads {width} inputs a step: give (T, B, {width})")


def _check_state(state: State, template: State) -> None:
    given, wanted = ([tuple(part.shape) for part in parts] for parts in (state, template))
    if given != wanted:
        raise InputError(f"h0 has shape {given}, but the module's state has shape {wanted}")
    types = [(part.dtype, part.device) for part in state], [(part.dtype, part.device) for part in template]
    if types[0] != types[1]:
        (dtype, device), (own, own_device) = types[0][0], types[1][0]
        raise InputError(f"h0 is {dtype} on {device} but the module computes in {own} on {own_device}: convert it")
    if any(not part.isfinite().all() for part in state):
        raise InputError("h0 holds NaN or infinite values: give finite numbers")


def _tensor(x: Any) -> Tensor:
    """x itself, or a copy of an array (so that a read-only memory map is read, once)."""
    return x if isinstance(x, Tensor) else torch.from_numpy(np.array(x))


def _finite(x: Tensor) -> Tensor:
    # the sum is one cheap pass; only when it is not finite does it pay to look at every value
    if x.is_floating_point() and not x.detach().sum().isfinite() and not x.detach().isfinite().all():
        raise InputError("x holds NaN or infinite values: clean it first, since they would spread to every later step")
    return x


def _layer_from_cell(cell: nn.RNNCellBase) -> nn.RNNBase:
    kinds: dict[type, Any] = {nn.RNNCell: nn.RNN, nn.GRUCell: nn.GRU, nn.LSTMCell: nn.LSTM}
    if type(cell) not in kinds or cell._forward_hooks or cell._forward_pre_hooks:
        raise InputError(
            f"{type(cell).__name__} is not a plain nn.RNNCell, nn.GRUCell or nn.LSTMCell: wrap it in a module that"
            " returns (y, state) for a sequence"
        )
    kind = kinds[type(cell)]
    nonlinearity = {"nonlinearity": cell.nonlinearity} if isinstance(cell, nn.RNNCell) else {}
    layer = kind(cell.input_size, cell.hidden_size, bias=cell.bias, device="meta", **nonlinearity)
    for name, parameter in cell.named_parameters():
        setattr(layer, f"{name}_l0", parameter)
    return layer


def _one_direction(module: nn.RNNBase, layer: int, direction: int) -> nn.RNNBase:
    """One layer and direction of a bidirectional stack, as a module that shares its parameters."""
    kind = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(module.mode, nn.RNN)
    special: dict[str, Any] = {"nonlinearity": "relu"} if module.mode == "RNN_RELU" else {}
    if module.proj_size:
        special["proj_size"] = module.proj_size
    width = module.input_size if layer == 0 else 2 * (module.proj_size or module.hidden_size)
    single = kind(width, module.hidden_size, bias=module.bias, device="meta", **special)
    suffix = f"_l{layer}" + "_reverse" * direction
    for name in [name.removesuffix("_l0") for name, _ in single.named_parameters()]:
        weight = getattr(module, name + suffix)
        if not isinstance(weight, nn.Parameter):  # a parametrization computes it
            delattr(single, f"{name}_l0")
        setattr(single, f"{name}_l0", weight)
    return single


def _run_bidirectional(call: _Call, options: Options, target: Any = None) -> _Result:
    """Every layer and direction by itself; the error of a layer reaches the next through its measured input gain."""
    module, x = call.module, _finite(_tensor(call.x))
    assert isinstance(module, nn.RNNBase)
    if not is_stock(module):
        raise GiveUp("a bidirectional module with a forward or hooks of its own runs as it is")
    share = options._replace(tol=max(options.tol / module.num_layers, 16 * torch.finfo(x.dtype).eps), certificate=None)
    error, finals, evidences = 0.0, [], []
    for layer in range(module.num_layers):
        results, errors = [], []
        for direction in (0, 1):
            plain = ModuleEngine(_one_direction(module, layer, direction), x)
            inputs = x.flip(0) if direction else x
            start = tuple(part[2 * layer + direction :][:1] for part in call.h0)
            result = _attempt(plain, inputs, start, share)
            passed_on = _input_gain(plain, inputs, options.tol) * error if error else 0.0
            errors.append(result.evidence.error_estimate + passed_on)
            results.append(result)
        x = torch.cat([results[0].y, results[1].y.flip(0)], dim=-1)
        error = max(errors)
        finals += [result.state for result in results]
        evidences += [result.evidence for result in results]
    if error > options.tol:
        raise GiveUp(f"the errors of the layers add up to {error:.1e}")
    evidence = replace(merged(evidences), steps=len(x), tol=options.tol, error_estimate=error)
    if options.certificate is not None:
        evidence = replace(evidence, note="certificates are for one direction: measured instead")
    if target is not None:
        _write(target, 0, x)
    return _Result(x, tuple(torch.cat(parts) for parts in zip(*finals, strict=True)), evidence, None)


@torch.no_grad()
def _input_gain(plain: ModuleEngine, x: Tensor, tol: float, windows: int = 8, steps: int = 64) -> float:
    """Largest change of an output per change of the inputs, over a few windows of x."""
    steps = min(steps, len(x))
    at = torch.linspace(0, len(x) - steps, windows, device=x.device).long()
    block = x[at + torch.arange(steps, device=x.device)[:, None]].flatten(1, 2)
    other = perturbed((block,), tol)[0]
    start = plain.zero_state(block.shape[1])
    change = plain.advance(other, start)[0] - plain.advance(block, start)[0]
    return (change.abs().max() / (other - block).abs().max()).item()


def _run_packed(module: nn.Module, x: PackedSequence, h0: Any, options: Options) -> tuple[Any, Any, Evidence]:
    """Every sequence by itself, longest first; where one cannot, the module runs on the packed batch."""
    padded, lengths = pad_packed_sequence(x._replace(data=_finite(x.data)))
    if h0 is not None and any(part.dim() != 3 or part.shape[1] != len(lengths) for part in parts_of(h0)):
        raise InputError(f"h0 must have shape (layers, {len(lengths)}, H): one start state for each packed sequence")
    begun, results = time.perf_counter(), {}
    if options.chunks == "auto" and len(padded) >= _SHORTEST:
        first = _rows_of(h0, slice(1))
        together = len(padded) * sequential_step(ModuleEngine(module, padded, h0), padded)
        one_by_one = int(lengths.sum()) * sequential_step(ModuleEngine(module, padded[:, :1], first), padded[:, :1])
        options = options._replace(budget=min(1.0, together / one_by_one))
    for b in torch.argsort(lengths, descending=True).tolist():
        sequence = padded[: lengths[b], b : b + 1]
        start = _rows_of(h0, slice(b, b + 1))
        straight = sequence.transpose(0, 1) if getattr(module, "batch_first", False) else sequence
        call = _Call.checked(module, straight, start, options)
        try:
            run = _run_bidirectional if getattr(module, "bidirectional", False) else _run_spans
            results[b] = run(call, options)
        except GiveUp as reason:
            # What is left is shorter; where only its length is in the way, what is done already may stand.
            if not (results and isinstance(reason, NotWorthIt)):
                y, state = module(x, h0)
                return y, state, sequential_evidence(int(lengths.sum()), options, str(reason), begun)
            rest = [c for c in range(len(lengths)) if c not in results]
            said = sequential_evidence(int(lengths[rest].sum()), options, str(reason), begun)
            results |= _run_the_rest(module, padded, lengths, h0, rest, said)
            break
    order = range(padded.shape[1]) if x.sorted_indices is None else x.sorted_indices.tolist()
    y = torch.nn.utils.rnn.pad_sequence([results[b].y[:, 0] for b in order])
    data = pack_padded_sequence(y, lengths[list(order)]).data
    state = tuple(torch.cat(parts, dim=1) for parts in zip(*(results[b].state for b in sorted(results)), strict=True))
    evidence = merged([result.evidence for result in results.values() if result.evidence.mode == "parallel"])
    alone = sum(result.evidence.mode == "sequential" for result in results.values())
    if alone:
        steps, note = int(lengths.sum()), f"{alone} of {len(results)} sequences, the shortest, ran step by step"
        evidence = replace(evidence, steps=steps, note=note)
    packed = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return packed, call.plain.pack(state), evidence


def _run_the_rest(
    module: nn.Module, padded: Tensor, lengths: Tensor, h0: Any, rest: list[int], said: Evidence
) -> dict[int, _Result]:
    """The sequences too short to gain anything, in one call of the module; `said` is the evidence of each."""
    packed = pack_padded_sequence(padded[: int(lengths[rest].max()), rest], lengths[rest], enforce_sorted=False)
    y, state = module(packed, _rows_of(h0, rest))
    outputs, _ = pad_packed_sequence(y)

    def result(n: int, b: int) -> _Result:
        end = tuple(part[:, n : n + 1] for part in parts_of(state))
        return _Result(outputs[: lengths[b], n : n + 1], end, said, None)

    return {b: result(n, b) for n, b in enumerate(rest)}


def _rows_of(h0: Any, rows: slice | list[int]) -> Any:
    """The start state of some sequences of a batch, in the form it was given in."""
    if h0 is None or isinstance(h0, Tensor):
        return None if h0 is None else h0[:, rows]
    return tuple(part[:, rows] for part in h0)


def _run_spans(call: _Call, options: Options, target: Any = None, carry: Carry | None = None) -> _Result:
    """The whole sequence at once, or span after span where x is an array or a target is given: bounded memory."""
    begun, steps = time.perf_counter(), len(call.x)
    span = steps if target is None and isinstance(call.x, Tensor) else _span_steps(call)
    # What the first span showed speaks for the later ones.
    later = [(begin, options._replace(attempt_share=CHECKED_SHARE)) for begin in range(span, steps, span)]
    carry = carry or Carry()
    try:
        return _run_these([(0, options), *later], call, carry, target)
    except TryAPart as reason:
        result = _run_these([*_part_and_rest(reason, min(span, steps), call, options), *later], call, carry, target)
        return result._replace(evidence=_with_pilot(result.evidence, reason, time.perf_counter() - begun))


def _part_and_rest(reason: TryAPart, steps: int, call: _Call, options: Options) -> list[tuple[int, Options]]:
    """A span in two: a part that shows cheaply whether the rest will hold."""
    part = steps // _PART
    if part < _SHORTEST:
        raise reason
    left = left_for_the_rest(reason, part, steps - part, call.x.shape[1])
    known = options._replace(warmup=reason.warmup, cost=reason.ledger.cost)
    return [
        (0, known._replace(budget=options.budget * _PART)),
        (part, known._replace(budget=left, attempt_share=CHECKED_SHARE)),
    ]


def _with_pilot(evidence: Evidence, reason: TryAPart, seconds: float) -> Evidence:
    """The evidence of a run that took so many seconds with the attempt before it, whose pilot it went by."""
    assert reason.ledger.cost is not None
    return replace(
        evidence,
        forgetting_rate=reason.rate,
        sequential_depth=evidence.sequential_depth + reason.ledger.depth,
        estimated_speedup=reason.ledger.cost.sequential * evidence.steps / seconds,
    )


def _run_these(spans: list[tuple[int, Options]], call: _Call, carry: Carry, target: Any) -> _Result:
    """One span after the other, each with where it begins."""
    steps, begins = len(call.x), [begin for begin, _ in spans]
    state, pieces, evidences = call.h0, [], []
    if spans[0][1].chunks == "auto" and steps < _SHORTEST:
        raise NotWorthIt(f"{steps} steps are too few to gain anything: give chunks and warmup to insist")
    _check_batch_of_chunks(call.plain, _finite(_tensor(call.x[:_CARRY_STEPS])), state, spans[0][1].tol)
    for (begin, options), end in zip(spans, [*begins[1:], steps], strict=True):
        with torch.set_grad_enabled(torch.is_grad_enabled() and target is None):
            x = _finite(_tensor(call.x[begin:end]))
            result = _attempt_of_any(call.plain, x, state, options, carry)
        state = result.state
        carry = Carry(result.evidence.error_estimate, result.end_error)
        evidences.append(result.evidence)
        if target is None:
            pieces.append(result.y)
        else:
            _write(target, begin, result.y)
    y = torch.empty(0) if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return _Result(y, state, merged(evidences), carry.error)


def _span_steps(call: _Call) -> int:
    """Equal spans whose inputs, outputs and states fit the memory set aside."""
    bytes_a_step = 8 * (np.prod(call.x.shape[1:]) + 2 * sum(part.numel() for part in call.h0))
    most = max(2 * _SHORTEST, int(_SPAN_BYTES // bytes_a_step))
    return -(-len(call.x) // -(-len(call.x) // most))


def _time_major(out: Any, call: _Call) -> Any:
    if out is None:
        return None
    wanted = (*call.original_x.shape[: 1 if call.unbatched else 2], *_output_shape(call))
    if not isinstance(out, Tensor | np.ndarray):
        raise InputError(f"out must be a tensor or a NumPy array, not {type(out).__name__}")
    if _shares_memory(out, call.original_x):
        raise InputError("out lies in the memory of x, which is still read when outputs are written: give another out")
    if isinstance(out, np.ndarray) and (out.dtype not in _NUMPY_TYPES or not out.flags.writeable):
        raise InputError(f"out cannot be written to as {out.dtype}: give a writable array of the module's type")
    dtype = _tensor(out[:0]).dtype if isinstance(out, np.ndarray) else out.dtype
    if dtype != call.h0[0].dtype:
        raise InputError(f"out is {dtype} but the module computes in {call.h0[0].dtype}: give an out of that type")
    if tuple(out.shape) != wanted:
        raise InputError(f"out has shape {tuple(out.shape)}, but the outputs have shape {wanted}")
    return out[:, None] if call.unbatched else out.swapaxes(0, 1) if call.batch_first else out


def _output_shape(call: _Call) -> tuple[int, ...]:
    """The shape of one output of one sequence; of a module of the user's own, by a look at its first."""
    if getattr(call.module, "bidirectional", False):
        return (2 * call.h0[0].shape[-1],)
    if is_stock(call.module):
        return (call.h0[0].shape[-1],)
    with torch.no_grad():
        return tuple(call.plain.advance(_finite(_tensor(call.x[:1])), call.h0)[0].shape[2:])


def _shares_memory(out: Any, x: Any) -> bool:
    arrays = [t.detach().numpy() if isinstance(t, Tensor) and t.is_cpu else t for t in (out, x)]
    if all(isinstance(array, np.ndarray) for array in arrays):
        return bool(np.may_share_memory(arrays[0], arrays[1]))
    tensors = [t.untyped_storage().data_ptr() for t in arrays if isinstance(t, Tensor)]
    return len(tensors) == 2 and tensors[0] == tensors[1]


def _write(target: Any, begin: int, y: Tensor) -> None:
    y = y.detach()
    target[begin : begin + len(y)] = y if isinstance(target, Tensor) else y.cpu().numpy()


def _run_sequentially(call: _Call, options: Options, out: Any, reason: str, begun: float) -> tuple[Any, Any, Evidence]:
    """The module itself, on the whole batch, from h0: in one call, or span after span into `out`."""
    evidence = sequential_evidence(len(call.x), options, reason, begun)
    if out is None:
        x = _finite(_tensor(call.original_x))
        started = time.perf_counter()
        y, state = call.module(x, call.original_h0)
        if x.device.type == "cpu" and not y.requires_grad:
            learn_sequential_step(call.plain, _tensor(call.x[:1]), len(call.x), time.perf_counter() - started)
        return y, state, evidence
    return out, call.original_state(_run_in_spans(call, call.h0, _time_major(out, call))), evidence


@torch.no_grad()
def _run_in_spans(call: _Call, state: State, target: Any) -> State:
    """The module step by step, a span at a time, into the target; a bidirectional one has to see all of x at once."""
    whole = getattr(call.module, "bidirectional", False)
    span = len(call.x) if whole else _span_steps(call)
    for begin in range(0, len(call.x), span):
        y, state = call.plain.advance(_finite(_tensor(call.x[begin : begin + span])), state)
        _write(target, begin, y)
    return state


def chunked_reference(module: nn.Module, x: Tensor, h0: Any, chunks: int, warmup: int) -> Tensor:
    """The plain reference of the unchecked run: chunk after chunk, each after its warm-up; x (T, B, D), h0 or None.

    The same chunks as `run_parallel` cuts, so that outputs and gradients can be compared.
    """
    plan, kept = Plan.cut(len(x), chunks, warmup), []
    for chunk in range(plan.chunks):
        start = chunk * plan.length - plan.offset
        begin = max(0, start - plan.warmup)
        y, _ = module(x[begin : max(0, start + plan.length)], h0 if begin == 0 else None)
        kept.append(y[max(0, start) - begin :])
    return torch.cat(kept)


def run_parallel(
    module: nn.Module,
    x: Any,
    h0: Any = None,
    tol: float = 1e-4,
    chunks: int | Literal["auto"] = "auto",
    warmup: int | Literal["auto"] = "auto",
    verify: Verify = "pilot",
    certificate: Certificate | None = None,
    out: Any = None,
) -> tuple[Any, Any, Evidence]:
    """Run a recurrent module over x in parallel over time, check the answer, and return (y, state, evidence).

    y and state are what `module(x, h0)` returns, within `tol` (max norm over outputs and final state), or exactly that
    where the check fails: then the module itself ran, on the whole batch, from h0 (docs/parallel.md).

    `module`: `nn.RNN`, `nn.LSTM`, `nn.GRU` (stacks, `batch_first`, bidirectional), one of their `Cell` modules, or any
    causal module with the same call and states `(layers, B, ...)`. `x`: `(T, B, D)`, `(B, T, D)` with `batch_first`,
    `(T, D)`, a `PackedSequence`, or a NumPy array (a memory map is read a span at a time). `chunks`, `warmup`: whole
    numbers, or "auto": from a measured cost model of this machine and what the module forgets in a pilot. `verify`:
    measure the gain on a "pilot" of chunks or over all "outputs". `certificate`: where it holds for x and h0,
    `evidence.bound` is proved and no second run is needed. `out`: a tensor or array of y's shape to write to.

    Raises `InputError` (a `ValueError`) for NaN, an empty sequence, a wrong shape, or a tol below 16 eps.

    >>> import torch
    >>> lstm = torch.nn.LSTM(3, 8)
    >>> x = torch.randn(400, 1, 3)
    >>> y, state, evidence = run_parallel(lstm, x, chunks=8, warmup=50)
    >>> bool((y - lstm(x)[0]).abs().max() < 1e-4), evidence.chunks
    (True, 8)
    """
    options = Options.checked(tol, chunks, warmup, verify, certificate)
    if isinstance(module, nn.RNNCellBase):
        module = _layer_from_cell(module)
    if isinstance(x, PackedSequence):
        if out is not None:
            raise InputError("out cannot be given with a PackedSequence: the answer is a PackedSequence too")
        return _run_packed(module, x, h0, options)
    call = _Call.checked(module, x, h0, options)
    begun = time.perf_counter()
    try:
        if getattr(module, "bidirectional", False):
            result = _run_bidirectional(call, options, _time_major(out, call))
        else:
            result = _run_spans(call, options, _time_major(out, call))
    except GiveUp as reason:
        return _run_sequentially(call, options, out, str(reason), begun)
    y = call.original_layout(result.y) if out is None else out
    return y, call.original_state(result.state), result.evidence


class Parallel(nn.Module):
    """A module to put in the place of a recurrent one: the same call, run by `run_parallel` and checked each time.

    `forward(x, hx) -> (y, state)`; `evidence` tells what the last call showed. Parameters are those of `module`.

    >>> import torch
    >>> fast = Parallel(torch.nn.GRU(3, 8), chunks=4, warmup=60)
    >>> y, h_n = fast(torch.randn(400, 1, 3))
    >>> y.shape, fast.evidence.mode
    (torch.Size([400, 1, 8]), 'parallel')
    """

    def __init__(
        self,
        module: nn.Module,
        tol: float = 1e-4,
        chunks: int | Literal["auto"] = "auto",
        warmup: int | Literal["auto"] = "auto",
        verify: Verify = "pilot",
        certificate: Certificate | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        Options.checked(tol, chunks, warmup, verify, certificate)
        self.options: dict[str, Any] = {
            "tol": tol,
            "chunks": chunks,
            "warmup": warmup,
            "verify": verify,
            "certificate": certificate,
        }
        self.evidence: Evidence | None = None

    # What it does depends on what it measures: torch.compile takes what stands around it. (The public name of this
    # decorator, torch.compiler.disable, imports the whole compiler at once, for seconds.)
    @torch._disable_dynamo
    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        options = self.options
        if drops_out(self.module):  # while a model trains: each run differs, and none can be checked against another
            begun, reason = time.perf_counter(), "dropout between the layers is on"
            y, state = self.module(input, hx)
            outputs = y.data if isinstance(y, PackedSequence) else y
            steps = outputs.numel() // outputs.shape[-1]
            self.evidence = sequential_evidence(steps, Options.checked(**options), reason, begun)
            return y, state
        certificate = options["certificate"]
        outdated = certificate is not None and not certificate.is_about(self.module)
        y, state, evidence = run_parallel(
            self.module, input, hx, **{**options, "certificate": None if outdated else certificate}
        )
        if outdated:
            evidence = replace(evidence, note="the weights are no longer those of the certificate: measured instead")
        self.evidence = evidence
        return y, state

    def __getattr__(self, name: str) -> Any:
        """Sizes and the like (`hidden_size`, `batch_first`, …) are those of the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)
