"""The parallel run over several processes: each rank runs its own span of one long sequence, at the same time.

Start it with `torchrun --nproc-per-node=N script.py` (gloo on processors, NCCL on GPUs). Each rank reads its span and
the warm-up before it, runs that span with `run_parallel`, and sends its end state to the next rank: one state vector
for each boundary. The check is the same as between chunks, and so is the answer.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unrecurrent.agreement import Carry
from unrecurrent.chunks import GiveUp, Ledger, NotWorthIt
from unrecurrent.engines import State, choose_engine
from unrecurrent.errors import InputError
from unrecurrent.evidence import Evidence, Options, Verify
from unrecurrent.parallel import (
    _CARRY_STEPS,
    _Call,
    _check_batch_of_chunks,
    _finite,
    _run_in_spans,
    _run_spans,
    _tensor,
    _time_major,
)
from unrecurrent.pilot import forgetting

_T = TypeVar("_T")
_ROUNDS = 3
_NEEDED = "the module needs its recurrence, at least on one rank"
_PILOT_STEPS = 1 << 16


def run_sharded(
    module: nn.Module,
    x: Any,
    h0: Any = None,
    tol: float = 1e-4,
    chunks: int | Literal["auto"] = "auto",
    warmup: int | Literal["auto"] = "auto",
    verify: Verify = "pilot",
    out: Any = None,
) -> tuple[Any, Any, Evidence]:
    """Run a causal recurrent module over x on all ranks of the process group: (y of this span, end state, evidence).

    Every rank calls it with the same module and the same x (say, one memory map: only the rank's span and its warm-up
    are read). Rank r of N owns the steps from r T // N to (r + 1) T // N. The end state is that of the whole sequence,
    on every rank. With `out` (a memory map of the whole output's shape) each rank writes its span there.

    Where a boundary fails the check, the rank behind it runs again from the state it was sent; where the module needs
    its recurrence, the ranks run one after the other, from h0, with the module itself. Arguments and errors are those
    of `run_parallel` (docs/parallel.md); there are no gradients. Without a process group it is one rank.

    >>> import torch
    >>> y, h_n, evidence = run_sharded(torch.nn.GRU(3, 8), torch.randn(400, 1, 3), chunks=4, warmup=60)
    >>> y.shape, evidence.note
    (torch.Size([400, 1, 8]), 'rank 0 of 1: steps 0 to 400')
    """
    if getattr(module, "bidirectional", False):
        raise InputError("a bidirectional module cannot be sharded over time: run each direction by itself")
    options = Options.checked(tol, chunks, warmup, verify, None)
    call = _Call.checked(module, x, h0, options)
    with torch.no_grad():
        shard = _Shard(call, options, _time_major(out, call))
        state, evidence = shard.run()
    y = shard.target if out is not None else call.original_layout(shard.target)
    return y, call.original_state(state), evidence


class _Shard:
    """This rank's span: what it starts from, where its outputs go, and what it exchanges with its neighbours."""

    def __init__(self, call: _Call, options: Options, target: Any) -> None:
        spread = dist.is_available() and dist.is_initialized()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if spread else (0, 1)
        self.whole, self.options = call, options
        steps = len(call.x)
        if steps < self.ranks:
            raise InputError(f"a sequence of {steps} steps cannot be shared by {self.ranks} ranks: start fewer")
        self.begin, self.end = (steps * rank // self.ranks for rank in (self.rank, self.rank + 1))
        self.call = call._replace(x=call.x[self.begin : self.end])
        if target is None:
            first, _ = call.plain.advance(_tensor(call.x[:1]), call.h0)
            self.target = first.new_empty(self.end - self.begin, *first.shape[1:])
        else:
            self.target = target[self.begin : self.end]

    def run(self) -> tuple[State, Evidence]:
        self._together(self._check_carrying)
        warmup = self._agreed_warmup()
        if warmup is None:
            return self._one_after_the_other(_NEEDED)
        start = self._together(lambda: self._warmed_up(warmup))
        end, evidence = self._together(lambda: self._run_from(start, warmup))
        for sweeps in range(_ROUNDS + 1):
            if self._largest(float(evidence is None)):
                return self._one_after_the_other(_NEEDED)
            assert evidence is not None
            sent = self._from_before(end)
            mismatch = _largest_of((a - b).abs().max().item() for a, b in zip(start, sent, strict=True))
            errors = self._errors(mismatch, evidence)
            error, worst = errors[self.rank], _largest_of(errors)
            if worst <= self.options.tol:
                evidence = replace(
                    evidence,
                    max_mismatch=self._largest(max(mismatch, evidence.max_mismatch)),
                    error_estimate=worst,
                    sweeps=evidence.sweeps + sweeps,
                    note=f"rank {self.rank} of {self.ranks}: steps {self.begin} to {self.end}",
                )
                return self._last(end), evidence
            again = not error <= self.options.tol and mismatch > 0
            start = sent if again else start
            end, evidence = self._together(lambda: self._run_from(start, warmup) if again else (end, evidence))  # noqa: B023
        return self._one_after_the_other(f"the ranks do not agree after {_ROUNDS} sweeps")

    def _errors(self, mismatch: float, evidence: Evidence) -> list[float]:
        gain = _largest_of((1.0, 1.0 if evidence.gain is None else evidence.gain))
        left = gain if evidence.left is None else evidence.left
        return accumulated(self._gathered([mismatch, gain, left, evidence.error_estimate]))

    def _together(self, work: Callable[[], _T]) -> _T:
        """Do a rank's own work; what is wrong with the input of one rank is an `InputError` on all of them."""
        result, fault = None, None
        try:
            result = work()
        except InputError as error:
            fault = error
        if not self._largest(float(fault is not None)):
            return result  # type: ignore[return-value]
        raise fault or InputError("the input of another rank cannot be used: its own message says why")

    def _check_carrying(self) -> None:
        """Refuse a module that cannot be handed from rank to rank by its state."""
        head = _finite(_tensor(self.whole.x[:_CARRY_STEPS]))
        try:
            _check_batch_of_chunks(self.whole.plain, head, self.whole.h0, self.options.tol)
        except GiveUp as reason:
            raise InputError(f"{reason}: it cannot be shared by ranks") from reason

    def _agreed_warmup(self) -> int | None:
        """The longest warm-up any rank asks for; None where one rank sees that its span does not forget."""
        if self.options.warmup != "auto":
            return self.options.warmup
        x = self._together(lambda: _finite(_tensor(self.call.x[:_PILOT_STEPS])))
        engine = choose_engine(self.call.plain, x, differentiable=False)
        try:
            warmup: float = forgetting(engine, x, self.options, Ledger())[0]
        except GiveUp:
            warmup = float("inf")
        warmup = self._largest(warmup)
        return None if warmup == float("inf") else int(warmup)

    def _warmed_up(self, warmup: int) -> State:
        if self.begin - warmup <= 0:
            state, begin = self.call.h0, 0
        else:
            state, begin = self.call.plain.zero_state(self.call.h0[0].shape[1]), self.begin - warmup
        if begin == self.begin:
            return state
        return self.call.plain.advance(_finite(_tensor(self.whole.x[begin : self.begin])), state)[1]

    def _run_from(self, start: State, warmup: int) -> tuple[State, Evidence | None]:
        """The span from a start state, in parallel over its chunks; step by step where that would save too little.

        No evidence: the chunks do not come to agree.
        """
        call = self.call._replace(h0=start)
        try:
            carry = Carry(exact=self.rank == 0)
            result = _run_spans(call, self.options._replace(warmup=warmup), self.target, carry)
            return result.state, result.evidence
        except NotWorthIt as reason:
            state = _run_in_spans(call, start, self.target)
            steps = self.end - self.begin
            evidence = Evidence(
                mode="sequential",
                steps=steps,
                tol=self.options.tol,
                verify=self.options.verify,
                warmup=warmup,
                sequential_depth=steps,
                gain=self._gain(start),
                fallback=str(reason),
            )
            return state, evidence
        except GiveUp:
            return start, None

    def _gain(self, start: State) -> float:
        """Largest change of an output, or of the end state, per change of the start state, where this span begins."""
        moved = tuple(part + 1e-3 * max(1.0, part.abs().max().item()) for part in start)
        size = max((a - b).abs().max().item() for a, b in zip(start, moved, strict=True))
        x = _finite(_tensor(self.call.x[:_PILOT_STEPS]))
        y, end = self.call.plain.advance(x, start)
        other_y, other_end = self.call.plain.advance(x, moved)
        changes = [(a - b).abs().max().item() for a, b in zip((y, *end), (other_y, *other_end), strict=True)]
        return max(changes) / size

    def _one_after_the_other(self, reason: str) -> tuple[State, Evidence]:
        self._together(self._check_inputs)
        state = self.call.h0 if self.rank == 0 else self._received(self.rank - 1)
        state = _run_in_spans(self.call, state, self.target)
        if self.rank + 1 < self.ranks:
            dist.send(_vector(state), self.rank + 1)
        steps = len(self.whole.x)
        evidence = Evidence(
            mode="sequential",
            steps=self.end - self.begin,
            tol=self.options.tol,
            verify=self.options.verify,
            sequential_depth=steps,
            fallback=reason,
        )
        return self._last(state), evidence

    def _check_inputs(self) -> None:
        """Look at every input before a rank waits for another that might not come."""
        for begin in range(0, len(self.call.x), _PILOT_STEPS):
            _finite(_tensor(self.call.x[begin : begin + _PILOT_STEPS]))

    def _from_before(self, end: State) -> State:
        """Send this rank's end state on and return that of the rank before (on the first rank: h0)."""
        sending = dist.isend(_vector(end), self.rank + 1) if self.rank + 1 < self.ranks else None
        before = self.call.h0 if self.rank == 0 else self._received(self.rank - 1)
        if sending is not None:
            sending.wait()
        return before

    def _received(self, rank: int) -> State:
        vector = torch.empty_like(_vector(self.call.h0))
        dist.recv(vector, rank)
        return self._parts(vector)

    def _last(self, state: State) -> State:
        """The end state of the last rank, on every rank."""
        if self.ranks == 1:
            return state
        vector = _vector(state)
        dist.broadcast(vector, self.ranks - 1)
        return self._parts(vector)

    def _parts(self, vector: Tensor) -> State:
        pieces = vector.split([part.numel() for part in self.call.h0])
        return tuple(piece.view_as(part) for piece, part in zip(pieces, self.call.h0, strict=True))

    def _gathered(self, values: list[float]) -> list[list[float]]:
        """What every rank says, in their order."""
        own = torch.tensor(values, dtype=torch.float64, device=self.call.h0[0].device)
        if self.ranks == 1:
            return [own.tolist()]
        found = [torch.empty_like(own) for _ in range(self.ranks)]
        dist.all_gather(found, own)
        return [row.tolist() for row in found]

    def _largest(self, value: float) -> float:
        if self.ranks == 1:
            return value
        number = torch.tensor([_largest_of((value,))], dtype=torch.float64, device=self.call.h0[0].device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()


def _largest_of(values: Iterable[float]) -> float:
    """The largest of some numbers, infinity where one is not a number: what `max` says then depends on their order."""
    known = list(values)
    return math.inf if any(math.isnan(value) for value in known) else max(known)


def accumulated(ranks: Sequence[Sequence[float]]) -> list[float]:
    """For every rank gain × error of its start state + its own error, from (mismatch, gain, left, own error) of each.

    A start state is off by its mismatch and by what the rank before was off at its end: `left` of its start error, and
    its own error on top.

    >>> accumulated([(0.0, 2.0, 0.5, 1.0), (0.25, 2.0, 0.5, 1.0)])
    [1.0, 3.5]
    """
    before, errors = 0.0, []
    for mismatch, gain, left, own in ranks:
        start = mismatch + before
        errors.append(gain * start + own)
        before = left * start + own
    return errors


def _vector(state: State) -> Tensor:
    return torch.cat([part.flatten() for part in state])
