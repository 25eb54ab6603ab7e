"""Run a recurrent layer in parallel over time, and check that the answer is the sequential one.

The sequence is cut into chunks that run as one batch. Each chunk first reads `warmup` inputs from before its start,
from the zero state; the first chunk starts from the true h0. The state a chunk starts its kept part from must agree
with the end state of the chunk before it (`mismatch`), and what a wrong start state does to the outputs (`gain`) is
measured or proved. Where the check fails and cannot be mended cheaply, the user's own module runs step by step. The
plain reference is `chunked_reference`; how it all works is told in docs/parallel.md.
"""

import math
import numbers
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unrecurrent.certificate import Certificate
from unrecurrent.engines import (
    Engine,
    ModuleEngine,
    State,
    StepCost,
    choose_engine,
    is_stock,
    parts_of,
    refuse_dropout,
    sequential_step,
    step_cost,
)
from unrecurrent.errors import InputError, is_whole
from unrecurrent.pages import new_empty

Verify = Literal["pilot", "outputs"]

_BLOCK = 16  # steps between two looks at the states; bounds the working memory
_PILOT_BLOCK = 16
_PILOT_ROWS = 16
_GAIN_CHUNKS = 8
_CARRY_STEPS = 16  # on which a user's module is tried
_NUMPY_TYPES = (np.float16, np.float32, np.float64)  # what outputs can be written as, in the machine's byte order
_SHORTEST = 1024  # below this many steps a pilot costs more than the chunks can save
_ATTEMPT_SHARE = 0.48  # of the sequential run: what may be spent before the parallel run is given up
_PILOT_SHARE = 0.1
_MOST_ROWS = 4096
_SPAN_BYTES = 1 << 27

# With verify="outputs" the inputs of the second run move by this many eps; a step itself rounds by this many.
KICK, ROUNDING_A_STEP = 64, 4
# What has become so many times smaller than the change of the start state no longer comes from it.
DIED_AWAY = 16


@dataclass(frozen=True)
class Evidence:
    """What a parallel run showed about its own answer; `bound` is proved, everything else is measured.

    `max_mismatch`: largest distance, over the boundaries, between a chunk's start state and the end state of the chunk
    before it (max norm over all parts of the state). `gain`: largest change of a kept output or end state per change of
    the start state, over the chunks run a second time from perturbed states; `left`: of their end states alone.
    `error_estimate`: largest gain × error of a start state (its mismatch, and what is left of the error before), and
    what rounding may add up to. `bound`: proved bound on the change of every output (real arithmetic), when a
    certificate held. `sequential_depth`: steps that had to wait for one another, pilot and checks included. `fallback`:
    why the module ran step by step.
    """

    mode: Literal["parallel", "sequential"]
    steps: int
    tol: float
    verify: Verify
    chunks: int = 1
    warmup: int = 0
    sweeps: int = 0
    sequential_depth: int = 0
    max_mismatch: float = 0.0
    gain: float | None = None
    gain_chunks: int = 0
    left: float | None = None
    error_estimate: float = 0.0
    bound: float | None = None
    forgetting_rate: float | None = None
    estimated_speedup: float = 1.0
    fallback: str | None = None
    seconds_before_fallback: float = 0.0
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.mode == "sequential":
            return f"sequential: {self.fallback}"
        proved = "" if self.bound is None else f", every output within {self.bound:.1e} (proved)"
        gain = "" if self.gain is None else f", gain {self.gain:.2g} on {self.gain_chunks} chunks (measured)"
        return (
            f"parallel: {self.chunks} chunks after {self.warmup} steps of warm-up, mismatch {self.max_mismatch:.1e}"
            f"{gain}{proved}, sweeps {self.sweeps}, depth {self.sequential_depth} of {self.steps} steps, "
            f"about {self.estimated_speedup:.1f} times faster"
        )


class _GiveUp(Exception):
    """The parallel run cannot keep its promise, or not cheaply; the message says why."""


class _NotWorthIt(_GiveUp):
    """The parallel run would save too little; nothing is said about the module."""


@dataclass
class _Ledger:
    """What an attempt has cost so far, by the cost model; leaves the parallel road before it becomes dear."""

    cost: StepCost | None
    limit: float
    spent: float = 0.0
    depth: int = 0

    def charge(self, steps: int, rows: int) -> None:
        self.depth += steps
        if self.cost is None:
            return
        self.spent += steps * self.cost.batched(rows)
        if self.spent > self.limit:
            raise _NotWorthIt("the parallel run would cost more than it can save")


@dataclass(frozen=True)
class _Plan:
    """Where the chunks lie. All have `length` steps but the first, which has `length - offset`.

    At local step j chunk c reads input c * length - warmup + j - offset; before input 0 it is not active.
    """

    steps: int
    chunks: int
    length: int
    warmup: int

    @classmethod
    def cut(cls, steps: int, chunks: int, warmup: int) -> "_Plan":
        length = -(-steps // max(1, chunks))
        return cls(steps, -(-steps // length), length, min(warmup, steps - length))

    @property
    def offset(self) -> int:
        return self.chunks * self.length - self.steps

    def first_row(self, step: int) -> int:
        return max(0, -(-(self.offset + self.warmup - step) // self.length))

    def position(self, row: int, step: int) -> int:
        return row * self.length - self.warmup + step - self.offset

    def segments(self, block: int) -> Iterator[tuple[int, int, int]]:
        """(first active row, from, to): pieces in which the rows stay the same, cut where the kept part begins."""
        step, end = 0, self.warmup + self.length
        while step < end:
            row = self.first_row(step)
            stops = [end, step + block]
            if row > 0:  # the step at which the row before joins, at input 0
                stops.append(self.offset + self.warmup - (row - 1) * self.length)
            if step < self.warmup:
                stops.append(self.warmup)
            yield row, step, min(stops)
            step = min(stops)


class _Attempt:
    """One parallel run of one layer stack over one span; x is (T, B, ...), states are tuples of (layers, B, ...)."""

    def __init__(self, module: nn.Module, engine: Engine, x: Tensor, h0: State, plan: _Plan, ledger: _Ledger) -> None:
        self.engine, self.x, self.h0, self.plan, self.ledger = engine, x, h0, plan, ledger
        self.module = module
        self.batch = x.shape[1]
        self.block = plan.warmup + plan.length if torch.is_grad_enabled() else _BLOCK
        self.y: Tensor | None = None
        self.starts: State = ()
        self.ends: State = ()

    def _inputs(self, row: int, begin: int, end: int) -> Tensor:
        """The inputs of chunks row, row + 1, … at local steps begin … end - 1, as (rows, steps, B, ...), no copy."""
        x, plan = self.x, self.plan
        time_stride, *rest = x.stride()
        size = (plan.chunks - row, end - begin, *x.shape[1:])
        start = x.storage_offset() + plan.position(row, begin) * time_stride
        return x.as_strided(size, (plan.length * time_stride, time_stride, *rest), start)

    def _advance(self, inputs: Tensor, state: State) -> tuple[Tensor, State]:
        """Advance chunks (rows, steps, B, ...) and return their outputs as (rows, steps, B, H)."""
        rows, steps = inputs.shape[:2]
        self.ledger.charge(steps, rows * self.batch)
        flat = inputs.transpose(0, 1).reshape(steps, rows * self.batch, *inputs.shape[3:])
        y, state = self.engine.advance(flat, state)
        return y.unflatten(1, (rows, self.batch)).transpose(0, 1), state

    def _keep(self, rows: slice | Tensor, begin: int, y: Tensor) -> None:
        plan = self.plan
        if self.y is None:
            self.y = new_empty(y, plan.chunks * plan.length, *y.shape[2:])
        table = self.y.unflatten(0, (plan.chunks, plan.length))
        table[rows, begin - plan.warmup : begin - plan.warmup + y.shape[1]] = y

    def outputs(self) -> Tensor:
        assert self.y is not None
        return self.y[self.plan.offset :]

    def final_state(self) -> State:
        return tuple(part[:, -1] for part in self.ends)

    def _split(self, state: State) -> State:
        return tuple(part.unflatten(1, (-1, self.batch)) for part in state)

    def _join(self, state: State | None, row: int, step: int) -> State:
        """The state of the rows from `row` on: new rows start from zeros, or from h0 where they stand at input 0."""
        plan = self.plan
        if state is None:
            state = self.engine.zero_state((plan.chunks - row) * self.batch)
            if plan.position(row, step) > 0:
                return state
            state = tuple(part[:, self.batch :] for part in state)
        if state[0].shape[1] == (plan.chunks - row) * self.batch:
            return state
        return tuple(torch.cat([first.to(part), part], dim=1) for first, part in zip(self.h0, state, strict=True))

    def run(self) -> None:
        """Warm up every chunk, then keep its outputs, its start state and its end state."""
        state: State | None = None
        for row, begin, end in self.plan.segments(self.block):
            state = self._join(state, row, begin)
            if begin == self.plan.warmup:
                kept = (self.plan.chunks - 1) * self.batch
                self.starts = self._split(tuple(part[:, part.shape[1] - kept :] for part in state))
            y, state = self._advance(self._inputs(row, begin, end), state)
            if begin >= self.plan.warmup:
                self._keep(slice(row, None), begin, y)
        assert state is not None
        self.ends = self._split(state)

    def mismatch(self) -> Tensor:
        """For chunks 1, 2, …: distance between its start state and the end state of the chunk before it."""
        return _far(self.starts, tuple(end[:, :-1] for end in self.ends))

    def sweep(self, chunks: Tensor) -> None:
        """Run the given chunks (of 1, 2, …) again, each from the end state of the chunk before it."""
        begin_state = tuple(part[:, chunks - 1] for part in self.ends)
        state: State = tuple(part.flatten(1, 2) for part in begin_state)
        for begin, end in self._kept_blocks():
            y, state = self._advance(self._inputs(1, begin, end)[chunks - 1], state)
            self._keep(chunks, begin, y)
        self.starts = _replace(self.starts, chunks - 1, begin_state)
        self.ends = _replace(self.ends, chunks, self._split(state))

    def gain_of_some(self, chunks: Tensor, tol: float) -> "_Gain":
        """What a change of start state does to the outputs and end states of the given chunks.

        Each chunk runs beside a copy of itself from a perturbed state, until the two states agree to rounding.
        """
        base = tuple(part[:, chunks - 1] for part in self.starts)
        other = _perturbed(base, tol)
        state: State = tuple(torch.cat([a, b], dim=1).flatten(1, 2) for a, b in zip(base, other, strict=True))
        size = apart = _far(base, other)
        worst, steps = torch.zeros_like(size), 0
        for begin, end in self._kept_blocks():
            steps += end - begin
            inputs = self._inputs(1, begin, end)[chunks - 1]
            y, state = self._advance(torch.cat([inputs, inputs]), state)
            worst = torch.maximum(worst, _change(y[: len(chunks)], y[len(chunks) :]))
            a, b = zip(*(part.chunk(2, dim=1) for part in self._split(state)), strict=True)
            apart = _far(a, b)
            if not (apart > _rounding(state)).any():
                break
        return _Gain(torch.maximum(worst, apart) / size, apart / size, steps)

    def gain_of_all(self, tol: float) -> "_Gain":
        """The same for chunks 1, 2, … in one batch, each against the outputs it has already given, to its very end.

        The inputs move too, by `KICK` eps in every step. A change of the start state that has died away says nothing
        of a stretch in which differences grow later on: there the rounding of each step grows, and so does this.
        """
        assert self.y is not None
        other = _perturbed(self.starts, tol)
        table = self.y.unflatten(0, (self.plan.chunks, self.plan.length))
        state: State = tuple(part.flatten(1, 2) for part in other)
        size = _far(self.starts, other)
        worst, regrown = torch.zeros_like(size), torch.zeros_like(size)
        died = torch.zeros_like(size, dtype=torch.bool)
        for begin, end in self._kept_blocks():
            y, state = self._advance(_kicked(self._inputs(1, begin, end)), state)
            kept = table[1:, begin - self.plan.warmup : end - self.plan.warmup]
            change = _change(y, kept)
            worst = torch.maximum(worst, change)
            regrown = torch.maximum(regrown, change * died)
            died |= change < size / DIED_AWAY
        apart = _far(self._split(state), tuple(part[:, 1:] for part in self.ends))
        rounding = regrown.max().item() * ROUNDING_A_STEP / KICK
        if not rounding <= tol:
            raise _GiveUp(f"rounding may grow to {rounding:.1e} inside a chunk")
        return _Gain(torch.maximum(worst, apart) / size, apart / size, self.plan.length)

    def _kept_blocks(self) -> Iterator[tuple[int, int]]:
        end = self.plan.warmup + self.plan.length
        for begin in range(self.plan.warmup, end, self.block):
            yield begin, min(end, begin + self.block)


class _Gain(NamedTuple):
    """Changes per change of a chunk's start state, one for each chunk."""

    largest: Tensor  # of a kept output or the end state
    left: Tensor  # of the end state
    steps: int  # after which it was left

    def rounding(self, a_step: float, plan: _Plan) -> float:
        """What errors of `a_step`, made in every step, add up to: within a chunk, and from chunk to chunk."""
        left = self.left.max().item()
        remembered = float(plan.length)
        if left < 1:
            remembered = min(remembered, 1 / -math.expm1(math.log(max(left, 1e-30)) / self.steps))
        inside, total = a_step * max(1.0, self.largest.max().item()) * remembered, 0.0
        for _ in range(plan.chunks):
            total = left * total + inside
        return total


def _far(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Max-norm distance for each chunk, over all parts of the states (layers, chunks, B, ...)."""
    return torch.stack([(x - y).abs().transpose(0, 1).flatten(1).amax(1) for x, y in zip(a, b, strict=True)]).amax(0)


def _change(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).amax(1)


def _rounding(state: State) -> float:
    return 8 * torch.finfo(state[0].dtype).eps * max(1.0, *(part.abs().max().item() for part in state))


def _kicked(inputs: Tensor) -> Tensor:
    """Inputs moved by ± `KICK` eps of the largest of them; symbols stay as they are."""
    if not inputs.is_floating_point():
        return inputs
    generator = torch.Generator().manual_seed(1)
    signs = torch.randint(0, 2, inputs.shape[1:], generator=generator).to(inputs) * 2 - 1
    return inputs + signs * (KICK * torch.finfo(inputs.dtype).eps * inputs.abs().max().item())


def _perturbed(state: State, tol: float) -> State:
    """The state moved by ± max(tol, 1000 eps), relative to its size: far above rounding, within the linear range."""
    generator = torch.Generator().manual_seed(0)

    def move(part: Tensor) -> Tensor:
        signs = torch.randint(0, 2, part.shape, generator=generator).to(part) * 2 - 1
        return part + signs * max(tol, 1000 * torch.finfo(part.dtype).eps) * max(1.0, part.abs().max().item())

    return tuple(move(part) for part in state)


def _replace(parts: State, index: Tensor, new: State) -> State:
    return tuple(part.index_copy(1, index, fresh.to(part)) for part, fresh in zip(parts, new, strict=True))


class _Options(NamedTuple):
    tol: float
    chunks: int | Literal["auto"]
    warmup: int | Literal["auto"]
    verify: Verify
    certificate: Certificate | None
    budget: float = 1.0  # share of a sequential run of its own that one sequence of a batch may cost

    @classmethod
    def checked(cls, tol: Any, chunks: Any, warmup: Any, verify: Any, certificate: Any) -> "_Options":
        for name, value, least in (("chunks", chunks, 1), ("warmup", warmup, 0)):
            if value != "auto" and not (is_whole(value) and value >= least):
                raise InputError(f'{name} is {value!r}: give a whole number from {least} on, or "auto"')
        if verify not in ("pilot", "outputs"):
            raise InputError(f'verify is {verify!r}: choose "pilot" or "outputs"')
        if isinstance(tol, bool) or not isinstance(tol, numbers.Real):
            raise InputError(f"tol is {tol!r}: give a number, such as 1e-4")
        if certificate is not None and not isinstance(certificate, Certificate):
            raise InputError(f"certificate must be what ur.certify returns, not {type(certificate).__name__}")
        return cls(float(tol), chunks, warmup, verify, certificate)


class _Result(NamedTuple):
    y: Tensor
    state: State
    evidence: Evidence
    end_error: Tensor | None  # proved bound on the error of the end state, by component


def _attempt(plain: ModuleEngine, x: Tensor, h0: State, options: _Options, carry: "_Carry | None" = None) -> _Result:
    """One checked parallel run of x (T, B, ...) from h0; raises `_GiveUp` where the module must run step by step."""
    begun = time.perf_counter()
    engine = choose_engine(plain, x, _needs_gradient(plain.module, x, h0))
    with torch.no_grad():
        plan, ledger, rate = _decide(engine, plain, x, options)
    attempt = _Attempt(plain.module, engine, x, h0, plan, ledger)
    attempt.run()
    check = _Check(attempt, options, carry or _Carry())
    check.run()
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


def _attempt_of_any(plain: ModuleEngine, x: Tensor, h0: State, options: _Options, carry: "_Carry") -> _Result:
    """`_attempt`; a module of the user's own may fail on a batch of chunks though it takes the user's batch."""
    try:
        return _attempt(plain, x, h0, options, carry)
    except (RuntimeError, ValueError, TypeError) as error:
        if is_stock(plain.module) or isinstance(error, InputError):
            raise
        raise _GiveUp(f"the module does not take the chunks as one batch ({error})") from error


@torch.no_grad()
def _check_state_carries_all(plain: ModuleEngine, head: Tensor, h0: State, tol: float) -> None:
    """Try on the first few steps that a user's module goes on from its state as if it had not been interrupted."""
    if is_stock(plain.module):
        return
    half = len(head) // 2
    whole, _ = plain.advance(head, h0)
    first, state = plain.advance(head[:half], h0) if half else (whole[:0], h0)
    second, _ = plain.advance(head[half:], state)
    if not float((torch.cat([first, second]) - whole).abs().max()) <= tol:
        raise _GiveUp("the module's state does not carry all of its past")


def _needs_gradient(module: nn.Module, x: Tensor, h0: State) -> bool:
    if not torch.is_grad_enabled():
        return False
    weights = (*module.parameters(), *getattr(module, "_flat_weights", ()))  # the latter may be computed from others
    return x.requires_grad or any(t is not None and t.requires_grad for t in (*h0, *weights))


def _decide(engine: Engine, plain: ModuleEngine, x: Tensor, options: _Options) -> tuple[_Plan, _Ledger, float | None]:
    """Choose warm-up and chunks: what was given, else from the cost model and what the model forgets in a pilot."""
    steps, batch = len(x), x.shape[1]
    if options.chunks != "auto" and (options.chunks == 1 or steps < 2):
        raise _NotWorthIt("one chunk is the sequential run")
    ledger = _Ledger(None, float("inf"))
    if options.chunks == "auto":
        cost = step_cost(engine, plain, x)
        ledger = _Ledger(cost, _ATTEMPT_SHARE * options.budget * cost.sequential * steps)
    rate = None
    warmup = options.warmup
    if warmup == "auto":
        warmup, rate = _forgetting(engine, x, options, ledger)
    chunks = options.chunks
    if chunks == "auto":
        assert ledger.cost is not None
        chunks = _cheapest_chunks(steps, batch, warmup, ledger.cost)
    plan = _Plan.cut(steps, chunks, warmup)
    if plan.chunks < 2:
        raise _NotWorthIt("one chunk is the sequential run")
    _check_cost(plan, batch, ledger, options.verify)
    return plan, ledger, rate


def _check_cost(plan: _Plan, batch: int, ledger: _Ledger, verify: Verify = "pilot") -> None:
    cost = ledger.cost
    if cost is None:
        return
    kept_twice = plan.length if verify == "outputs" else 0
    predicted = (plan.warmup + plan.length + kept_twice) * cost.batched(plan.chunks * batch)
    if ledger.spent + predicted > ledger.limit:
        raise _NotWorthIt(f"a warm-up of {plan.warmup} steps, or more, would save too little")


def _cheapest_chunks(steps: int, batch: int, warmup: int, cost: StepCost) -> int:
    """Minimise (warmup + T/C)(fixed + per_row C B) over C: C² = T fixed / (warmup per_row B)."""
    best = (steps * cost.fixed / (max(1, warmup) * cost.per_row * batch)) ** 0.5
    most = min(steps // 2, max(2, _MOST_ROWS // batch))
    return max(2, min(most, round(best)))


def _forgetting(engine: Engine, x: Tensor, options: _Options, ledger: _Ledger) -> tuple[int, float]:
    """How many steps a few windows of x need to forget a zero start state to a quarter of tol, and the rate a step."""
    if len(x) < 2 * _PILOT_BLOCK:
        raise _NotWorthIt(f"{len(x)} steps are too few to see what the module forgets: give warmup as well")
    pilot = _Pilot(engine, x, ledger)
    first = apart = pilot.apart()
    lag, target = 0, options.tol / 4
    while not apart <= target:
        before = apart
        if lag + _PILOT_BLOCK > pilot.longest:
            raise _GiveUp(f"the module still remembers its start state after {lag} steps (by {apart:.1e})")
        pilot.advance_pair()
        apart, lag = pilot.apart(), lag + _PILOT_BLOCK
        if ledger.cost is not None:
            chunks = _cheapest_chunks(len(x), x.shape[1], lag, ledger.cost)
            _check_cost(_Plan.cut(len(x), chunks, lag), x.shape[1], ledger)
        if not np.isfinite(apart):
            raise _GiveUp("the states do not stay finite")
    if lag == 0:
        return 0, 0.0
    rate = (max(apart, 1e-30) / first) ** (1 / lag)
    rounding = torch.finfo(pilot.dtype).eps * pilot.size() / max(1 - rate, 1e-12)
    if rounding > options.tol:
        raise _GiveUp(f"rounding alone would reach {rounding:.1e}, more than tol: use float64 or a larger tol")
    inside = np.log(before / target) / np.log(before / max(apart, 1e-30))
    exact = lag - _PILOT_BLOCK * (1 - inside)
    return int(1.25 * exact) + 3, rate


class _Pilot:
    """A few windows of x, each from a state the module reached and, beside it, from the zero state."""

    def __init__(self, engine: Engine, x: Tensor, ledger: _Ledger) -> None:
        self.engine, self.x, self.ledger, self.batch = engine, x, ledger, x.shape[1]
        windows = max(2, -(-_PILOT_ROWS // self.batch))
        rows = windows * self.batch
        history = min(64, max(_PILOT_BLOCK, len(x) // 64)) // _PILOT_BLOCK * _PILOT_BLOCK
        self.longest = self._longest(2 * rows)
        last = max(0, len(x) - history - self.longest)
        self.at = torch.linspace(0, last, windows, device=x.device).long()
        state = engine.zero_state(rows)
        for _ in range(history // _PILOT_BLOCK):
            state = self._advance(state, copies=1)
        self.dtype = state[0].dtype
        zeros = engine.zero_state(rows)
        self.state: State = tuple(torch.cat([part, zero], dim=1) for part, zero in zip(state, zeros, strict=True))

    def _longest(self, rows: int) -> int:
        """Lags to try: a quarter of the sequence and, where the cost is known, a share of a sequential run."""
        room, cost = len(self.x) // 4, self.ledger.cost
        if cost is None:
            return room
        return min(room, int(_PILOT_SHARE * cost.sequential * len(self.x) / cost.batched(rows)))

    def _advance(self, state: State, copies: int) -> State:
        index = self.at + torch.arange(_PILOT_BLOCK, device=self.x.device)[:, None]
        block = self.x[index].flatten(1, 2)
        self.at = self.at + _PILOT_BLOCK
        self.ledger.charge(_PILOT_BLOCK, block.shape[1] * copies)
        return self.engine.advance(torch.cat([block] * copies, dim=1), state)[1]

    def advance_pair(self) -> None:
        self.state = self._advance(self.state, copies=2)

    def apart(self) -> float:
        half = self.state[0].shape[1] // 2
        return max((part[:, :half] - part[:, half:]).abs().max().item() for part in self.state)

    def size(self) -> float:
        return max(1.0, *(part.abs().max().item() for part in self.state))


class _Carry(NamedTuple):
    """How far off the start state of a span may be: measured, and (with a certificate) proved by component."""

    mismatch: float = 0.0
    error: Tensor | None = None


class _Check:
    """Mismatch, then certificate or gain, then sweeps until every error is within the tolerance."""

    def __init__(self, attempt: _Attempt, options: _Options, carry: _Carry) -> None:
        self.attempt, self.options, self.carry = attempt, options, carry
        self.sweeps = 0
        self.gain: float | None = None
        self.gain_chunks = 0
        self.left: float | None = None
        self.bound: float | None = None
        self.end_error: Tensor | None = None
        self.note: str | None = None
        self.mismatch = attempt.mismatch().detach()
        self.error = float("nan")

    def run(self) -> None:
        self._agree(None)
        certificate = self._certificate()
        if certificate is not None:
            self._prove(certificate)
            assert certificate.rate is not None
            rounding = self._rounding_a_step() / (1 - certificate.rate)
            if self._proved_error() + rounding <= self.options.tol:
                self.error = self._proved_error() + rounding
                return
            self.note = "the proved bound and rounding exceed tol: the gain was measured as well"
        gain = self._measured_gain()
        rounding = gain.rounding(self._rounding_a_step(), self.attempt.plan)
        if not rounding <= self.options.tol:
            raise _GiveUp(f"rounding alone may grow to {rounding:.1e}, more than tol: use float64 or a larger tol")
        self._agree(gain)
        self.error = self._errors(gain).max().item() + rounding
        if self.error > self.options.tol:
            raise _GiveUp(
                f"the errors of the boundaries and rounding add up to {self.error:.1e}"
                if self.carry.mismatch <= self.options.tol
                else f"the start state of this span is uncertain by {self.carry.mismatch:.1e}"
            )
        if certificate is not None:
            self._prove(certificate)

    def _rounding_a_step(self) -> float:
        """How far a step of the batched run and one of the module itself may differ: an eps of the largest state."""
        states = (*self.attempt.starts, *self.attempt.ends)
        return torch.finfo(states[0].dtype).eps * max(1.0, *(part.detach().abs().max().item() for part in states))

    def _proved_error(self) -> float:
        """What is proved about the outputs and the final state together."""
        if self.bound is None or self.end_error is None:
            return math.inf
        return max(self.bound, float(self.end_error.max()))

    def _agree(self, gain: _Gain | None) -> None:
        """Sweep the chunks whose error exceeds the tolerance until there are none (without a gain: their mismatch)."""
        failing = self._failing(gain)
        while len(failing):
            self.attempt.sweep(failing)
            self.sweeps += 1
            self.mismatch = self.attempt.mismatch().detach()
            left = self._failing(gain)
            if len(left) > max(len(failing) // 2, min(len(failing) - 1, len(self.mismatch) // 8)):
                raise _GiveUp(f"{len(left)} of {len(self.mismatch) + 1} chunks do not come to agree")
            failing = left

    def _failing(self, gain: _Gain | None) -> Tensor:
        error = self.mismatch if gain is None else self._errors(gain)[1:]
        return torch.nonzero(~(error <= self.options.tol) & (self.mismatch != 0)).flatten() + 1

    def _errors(self, gain: _Gain) -> Tensor:
        """For chunks 0, 1, …: gain × error of the start state, which is mismatch + what is left of the one before."""
        start, errors = self.carry.mismatch, [self.carry.mismatch]
        for mismatch, left in zip(self.mismatch.tolist(), gain.left.tolist(), strict=True):
            start = mismatch + left * start
            errors.append(start)
        largest = torch.cat([gain.largest.max()[None], gain.largest]).clamp(min=1.0)
        return torch.tensor(errors).to(largest) * largest

    def _measured_gain(self) -> _Gain:
        """The gain of chunks 1, 2, …: for each of them the largest of a pilot, or of all chunks."""
        attempt, tol = self.attempt, self.options.tol
        others = attempt.plan.chunks - 1
        with torch.no_grad():
            if self.options.verify == "outputs":
                gain = attempt.gain_of_all(tol)
            else:
                some = torch.linspace(1, others, min(others, _GAIN_CHUNKS), device=self.mismatch.device)
                gain = attempt.gain_of_some(some.round().long(), tol)
        self.gain, self.gain_chunks = gain.largest.max().item(), len(gain.largest)
        self.left = gain.left.max().item()
        # One direction of change says little of a single chunk: the largest of all chunks is taken for each.
        return _Gain(gain.largest.max().expand(others), gain.left.max().expand(others), gain.steps)

    def _certificate(self) -> Certificate | None:
        """The certificate, where its assumptions hold for these inputs and this start state."""
        certificate = self.options.certificate
        if certificate is None:
            return None
        if not is_stock(self.attempt.module):
            self.note = "the certificate is about layers as torch runs them, not as this module does: measured instead"
            return None
        if certificate.stable and certificate.holds_for(self.attempt.x.detach(), self._packed(self.attempt.h0)):
            return certificate
        self.note = "the certificate does not hold for these inputs and this start state: measured instead"
        return None

    def _prove(self, certificate: Certificate) -> None:
        error = self._boundary_error(certificate)
        bound, self.end_error = _propagated(certificate, error, self.attempt.plan)
        self.bound = bound if math.isfinite(bound) else None

    def _packed(self, state: State) -> Any:
        return state[0] if len(state) == 1 else state

    def _boundary_error(self, certificate: Certificate) -> Tensor:
        starts = tuple(part.detach().flatten(1, 2) for part in self.attempt.starts)
        ends = tuple(part[:, :-1].detach().flatten(1, 2) for part in self.attempt.ends)
        apart = certificate.flatten(self._packed(starts)) - certificate.flatten(self._packed(ends))
        error = apart.double().abs().amax(0).cpu()
        return error if self.carry.error is None else torch.maximum(error, self.carry.error)


def _propagated(certificate: Certificate, error: Tensor, plan: _Plan) -> tuple[float, Tensor]:
    """Bound on every output and on the end state, from the error propagator T and the errors at the boundaries.

    With v the largest error at a boundary, component by component, and T^n(v) ≤ θ v over a chunk, every start state is
    within v / (1 - θ), since e_c = T^L(e_{c-1}) + mismatch_c, and the output n steps on within T^n(v) / (1 - θ). T is
    monotone and homogeneous, so once T^J(v) ≤ θ' v the later steps repeat the first J, shrunk, and need no computing.
    """
    if not error.any():
        return 0.0, error
    bound = _bound_from(certificate, error.clamp(min=1e-3 * error.max().item()), plan)
    weights = certificate.weights
    if math.isinf(bound[0]) and weights is not None:  # in the norm of the proof T shrinks from the first step on
        bound = _bound_from(certificate, (error / weights).max() * weights, plan)
    return bound


def _bound_from(certificate: Certificate, v: Tensor, plan: _Plan) -> tuple[float, Tensor]:
    """The same from errors of at most v at every boundary; infinite where T^n(v) does not come to lie below v."""
    e, worst_hidden, growth = v, 0.0, 1.0
    for _ in range(plan.length - plan.offset):
        e = certificate.propagate(e)
        worst_hidden = max(worst_hidden, certificate.hidden(e).max().item())
        shrink, growth = (e / v).max().item(), max(growth, (e / v).max().item())
        if shrink * growth <= 0.5:
            break
    theta = shrink * growth
    if theta >= 1:
        return float("inf"), torch.full_like(v, float("inf"))
    return worst_hidden / (1 - theta), v * (theta / (1 - theta))


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
    def checked(cls, module: nn.Module, x: Any, h0: Any, options: _Options) -> "_Call":
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


def _run_bidirectional(call: _Call, options: _Options, target: Any = None) -> _Result:
    """Every layer and direction by itself; the error of a layer reaches the next through its measured input gain."""
    module, x = call.module, _finite(_tensor(call.x))
    assert isinstance(module, nn.RNNBase)
    if not is_stock(module):
        raise _GiveUp("a bidirectional module with a forward or hooks of its own runs as it is")
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
        raise _GiveUp(f"the errors of the layers add up to {error:.1e}")
    evidence = replace(_merged(evidences), steps=len(x), tol=options.tol, error_estimate=error)
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
    other = _perturbed((block,), tol)[0]
    start = plain.zero_state(block.shape[1])
    change = plain.advance(other, start)[0] - plain.advance(block, start)[0]
    return (change.abs().max() / (other - block).abs().max()).item()


def _run_packed(module: nn.Module, x: PackedSequence, h0: Any, options: _Options) -> tuple[Any, Any, Evidence]:
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
        except _GiveUp as reason:
            # What is left is shorter; where only its length is in the way, what is done already may stand.
            if not (results and isinstance(reason, _NotWorthIt)):
                y, state = module(x, h0)
                return y, state, _sequential_evidence(int(lengths.sum()), options, str(reason), begun)
            rest = [c for c in range(len(lengths)) if c not in results]
            said = _sequential_evidence(int(lengths[rest].sum()), options, str(reason), begun)
            results |= _run_the_rest(module, padded, lengths, h0, rest, said)
            break
    order = range(padded.shape[1]) if x.sorted_indices is None else x.sorted_indices.tolist()
    y = torch.nn.utils.rnn.pad_sequence([results[b].y[:, 0] for b in order])
    data = pack_padded_sequence(y, lengths[list(order)]).data
    state = tuple(torch.cat(parts, dim=1) for parts in zip(*(results[b].state for b in sorted(results)), strict=True))
    evidence = _merged([result.evidence for result in results.values() if result.evidence.mode == "parallel"])
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


def _run_spans(call: _Call, options: _Options, target: Any = None) -> _Result:
    """The whole sequence at once, or span after span where x is an array or a target is given: bounded memory."""
    steps = len(call.x)
    span = steps if target is None and isinstance(call.x, Tensor) else _span_steps(call)
    state, carry, pieces, evidences = call.h0, _Carry(), [], []
    if options.chunks == "auto" and steps < _SHORTEST:
        raise _NotWorthIt(f"{steps} steps are too few to gain anything: give chunks and warmup to insist")
    _check_state_carries_all(call.plain, _finite(_tensor(call.x[:_CARRY_STEPS])), state, options.tol)
    for begin in range(0, steps, span):
        with torch.set_grad_enabled(torch.is_grad_enabled() and target is None):
            x = _finite(_tensor(call.x[begin : begin + span]))
            result = _attempt_of_any(call.plain, x, state, options, carry)
        state = result.state
        carry = _Carry(result.evidence.error_estimate, result.end_error)
        evidences.append(result.evidence)
        if target is None:
            pieces.append(result.y)
        else:
            _write(target, begin, result.y)
    y = torch.empty(0) if not pieces else pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return _Result(y, state, _merged(evidences), carry.error)


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


def _run_sequentially(call: _Call, options: _Options, out: Any, reason: str, begun: float) -> tuple[Any, Any, Evidence]:
    """The module itself, on the whole batch, from h0: in one call, or span after span into `out`."""
    evidence = _sequential_evidence(len(call.x), options, reason, begun)
    if out is None:
        y, state = call.module(_finite(_tensor(call.original_x)), call.original_h0)
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


def _sequential_evidence(steps: int, options: _Options, reason: str, begun: float) -> Evidence:
    wasted = time.perf_counter() - begun
    return Evidence(
        mode="sequential",
        steps=steps,
        tol=options.tol,
        verify=options.verify,
        sequential_depth=steps,
        fallback=reason,
        seconds_before_fallback=wasted,
    )


def _merged(evidences: list[Evidence]) -> Evidence:
    """One evidence for runs that came one after the other."""
    if len(evidences) == 1:
        return evidences[0]

    def largest(name: str) -> Any:
        values = [getattr(evidence, name) for evidence in evidences]
        return None if None in values else max(values)

    def total(name: str) -> int:
        return sum(getattr(evidence, name) for evidence in evidences)

    sums = {name: total(name) for name in ("steps", "chunks", "sweeps", "sequential_depth", "gain_chunks")}
    names = ("warmup", "max_mismatch", "gain", "left", "error_estimate", "bound", "forgetting_rate")
    seconds = sum(evidence.steps / evidence.estimated_speedup for evidence in evidences)
    notes = [evidence.note for evidence in evidences if evidence.note]
    merged: dict[str, Any] = {**sums, **{name: largest(name) for name in names}}
    merged |= {"estimated_speedup": sums["steps"] / seconds, "note": notes[0] if notes else None}
    return replace(evidences[0], **merged)


def chunked_reference(module: nn.Module, x: Tensor, h0: Any, chunks: int, warmup: int) -> Tensor:
    """The plain reference of the unchecked run: chunk after chunk, each after its warm-up; x (T, B, D), h0 or None.

    The same chunks as `run_parallel` cuts, so that outputs and gradients can be compared.
    """
    plan, kept = _Plan.cut(len(x), chunks, warmup), []
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
    options = _Options.checked(tol, chunks, warmup, verify, certificate)
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
    except _GiveUp as reason:
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
        _Options.checked(tol, chunks, warmup, verify, certificate)
        self.options: dict[str, Any] = {
            "tol": tol,
            "chunks": chunks,
            "warmup": warmup,
            "verify": verify,
            "certificate": certificate,
        }
        self.evidence: Evidence | None = None

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        options = self.options
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
