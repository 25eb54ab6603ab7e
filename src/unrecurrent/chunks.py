"""Chunks of a sequence that run as one batch: where they lie, their run, and what a wrong start state does to them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unrecurrent.engines import Engine, State, StepCost
from unrecurrent.pages import new_empty

_BLOCK = 16  # steps between two looks at the states, or two kicks
LONG_BLOCK = 128  # steps at once where nobody looks; bounds the working memory

# With verify="outputs" the inputs of the second run move by this many eps; a step itself rounds by this many.
KICK, ROUNDING_A_STEP = 16, 4
# And its start states by at least so many: what the kicks add up to must not pass for what is left of that change.
PUSH = 8000
# What has become so many times smaller than the change of the start state no longer comes from it.
DIED_AWAY = 16


class GiveUp(Exception):
    """The parallel run cannot keep its promise, or not cheaply; the message says why."""


class NotWorthIt(GiveUp):
    """The parallel run would save too little; nothing is said about the module."""


class TryAPart(NotWorthIt):
    """The parallel run would cost less than the sequential one, but too much for an attempt that may fail."""

    def __init__(self, warmup: int, rate: float | None, ledger: "Ledger") -> None:
        super().__init__(f"a warm-up of {warmup} steps would save less than half")
        self.warmup, self.rate, self.ledger = warmup, rate, ledger


@dataclass
class Ledger:
    """What an attempt has cost so far, by the cost model; leaves the parallel road before it becomes dear."""

    cost: StepCost | None = None
    limit: float = math.inf
    #: the limit once all boundaries agree
    checked_limit: float = math.inf
    #: whether the check runs every chunk a second time
    runs_twice: bool = False
    spent: float = 0.0
    depth: int = 0

    def charge(self, steps: int, rows: int) -> None:
        self.depth += steps
        if self.cost is None:
            return
        self.spent += steps * self.cost.batched(rows)
        if self.spent > self.limit:
            raise NotWorthIt("the parallel run would cost more than it can save")


@dataclass(frozen=True)
class Plan:
    """Where the chunks lie. All have `length` steps but the first, which has `length - offset`.

    At local step j chunk c reads input c * length - warmup + j - offset; before input 0 it is not active.
    """

    steps: int
    chunks: int
    length: int
    warmup: int

    @classmethod
    def cut(cls, steps: int, chunks: int, warmup: int) -> "Plan":
        length = -(-steps // max(1, chunks))
        return cls(steps, -(-steps // length), length, min(warmup, steps - length))

    @property
    def offset(self) -> int:
        return self.chunks * self.length - self.steps

    @property
    def shortest(self) -> int:
        """The length of the first chunk, which no other falls below."""
        return self.length - self.offset

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


class Attempt:
    """One parallel run of one layer stack over one span; x is (T, B, ...), states are tuples of (layers, B, ...)."""

    def __init__(self, module: nn.Module, engine: Engine, x: Tensor, h0: State, plan: Plan, ledger: Ledger) -> None:
        self.engine, self.x, self.h0, self.plan, self.ledger = engine, x, h0, plan, ledger
        self.module = module
        self.batch = x.shape[1]
        self.block = plan.warmup + plan.length if torch.is_grad_enabled() else _BLOCK
        self.long_block = max(self.block, LONG_BLOCK)
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

    def _advance(self, inputs: Tensor, state: State, out: Tensor | None = None) -> tuple[Tensor, State]:
        """Advance chunks (rows, steps, B, ...) and return their outputs as (rows, steps, B, H), in `out` if given."""
        rows, steps = inputs.shape[:2]
        self.ledger.charge(steps, rows * self.batch)
        flat = inputs.transpose(0, 1).reshape(steps, rows * self.batch, *inputs.shape[3:])
        if out is not None and self.batch == 1:
            _, state = self.engine.advance(flat, state, out.squeeze(2).transpose(0, 1))
            return out, state
        y, state = self.engine.advance(flat, state)
        y = y.unflatten(1, (rows, self.batch)).transpose(0, 1)
        return y if out is None else out.copy_(y), state

    def _keep(self, rows: slice | Tensor, begin: int, y: Tensor) -> None:
        self._table(y)[rows, begin - self.plan.warmup : begin - self.plan.warmup + y.shape[1]] = y

    def _table(self, like: Tensor | None = None) -> Tensor:
        """The outputs as (chunks, length, B, ...); made when first asked for, of the kind of some outputs."""
        plan = self.plan
        if self.y is None:
            assert like is not None
            self.y = new_empty(like, plan.chunks * plan.length, *like.shape[2:])
        return self.y.unflatten(0, (plan.chunks, plan.length))

    def outputs(self) -> Tensor:
        assert self.y is not None
        return self.y[self.plan.offset :]

    def final_state(self) -> State:
        return tuple(part[:, -1] for part in self.ends)

    def _split(self, state: State) -> State:
        return tuple(part.unflatten(1, (-1, self.batch)) for part in state)

    def _join(self, state: State | None, row: int, step: int, h0: State | None = None) -> State:
        """The state of the rows from `row` on: new rows start from zeros, or from h0 where they stand at input 0."""
        h0 = h0 or self.h0
        plan = self.plan
        if state is None:
            state = self.engine.zero_state((plan.chunks - row) * self.batch)
            if plan.position(row, step) > 0:
                return state
            state = tuple(part[:, self.batch :] for part in state)
        if state[0].shape[1] == (plan.chunks - row) * self.batch:
            return state
        return tuple(torch.cat([first.to(part), part], dim=1) for first, part in zip(h0, state, strict=True))

    def run(self) -> None:
        """Warm up every chunk, then keep its outputs, its start state and its end state."""
        state: State | None = None
        warmup, in_place = self.plan.warmup, not torch.is_grad_enabled()
        for row, begin, end in self.plan.segments(self.long_block):
            state = self._join(state, row, begin)
            if begin == warmup:
                kept = (self.plan.chunks - 1) * self.batch
                self.starts = self._split(tuple(part[:, part.shape[1] - kept :] for part in state))
            known = in_place and begin >= warmup and self.y is not None
            out = self._table()[row:, begin - warmup : end - warmup] if known else None
            y, state = self._advance(self._inputs(row, begin, end), state, out)
            self._table(y)  # known from the first warm-up on
            if begin >= warmup and out is None:
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
        for begin, end in self._blocks_from(self.plan.warmup, self.long_block):
            y, state = self._advance(self._inputs(1, begin, end)[chunks - 1], state)
            self._keep(chunks, begin, y)
        self.starts = _replace(self.starts, chunks - 1, begin_state)
        self.ends = _replace(self.ends, chunks, self._split(state))

    def gain_of_some(self, chunks: Tensor, tol: float) -> "Gain":
        """What a change of start state does to the outputs and end states of the given chunks (of 1, 2, …).

        Each chunk runs beside a copy of itself from a perturbed state, until the two states agree to rounding.
        """
        return self._gain(chunks, tuple(part[:, chunks - 1] for part in self.starts), self.plan.warmup, tol)

    def gain_of_first(self, tol: float) -> "Gain":
        """The same for chunk 0, whose start state is h0."""
        chunk = torch.zeros(1, dtype=torch.long, device=self.x.device)
        return self._gain(chunk, self._split(self.h0), self.plan.warmup + self.plan.offset, tol)

    def _gain(self, chunks: Tensor, base: State, first_step: int, tol: float) -> "Gain":
        other, least = perturbed(base, tol), int(chunks.min())
        state: State = tuple(torch.cat([a, b], dim=1).flatten(1, 2) for a, b in zip(base, other, strict=True))
        size = apart = _far(base, other)
        worst, steps = torch.zeros_like(size), 0
        for begin, end in self._blocks_from(first_step, self.block):
            steps += end - begin
            inputs = self._inputs(least, begin, end)[chunks - least]
            y, state = self._advance(torch.cat([inputs, inputs]), state)
            worst = torch.maximum(worst, _change(y[: len(chunks)], y[len(chunks) :]))
            a, b = zip(*(part.chunk(2, dim=1) for part in self._split(state)), strict=True)
            apart = _far(a, b)
            if not (apart > _rounding(state)).any():
                break
        return Gain(torch.maximum(worst, apart) / size, apart / size, steps)

    def gain_of_all(self, tol: float, exact: bool = True) -> "Gain":
        """The same for chunks 1, 2, … in one batch, each against the outputs it has already given, to its very end.

        The inputs move too, by `KICK` eps in every step, and so do the states after each block. A change of the start
        state that has died away says nothing of a stretch in which differences grow later on: there the rounding of
        each step grows, and so do these. Chunk 0 runs along for the sake of its rounding; where its start state is not
        `exact`, what changes of it do is counted with all others.
        """
        push = max(tol, PUSH * torch.finfo(self.h0[0].dtype).eps)
        first, others = perturbed(self.h0, push), perturbed(self.starts, push)
        size = torch.cat([_far(self._split(self.h0), self._split(first)), _far(self.starts, others)])
        worst, regrown = torch.zeros_like(size), torch.zeros_like(size)
        died = torch.zeros_like(size, dtype=torch.bool)
        ends = others
        for row, change, ends_of_block in self._kicked_run(first, others):
            gone = (change < size[row:, None] / DIED_AWAY).cummax(1).values | died[row:, None]
            worst[row:] = torch.maximum(worst[row:], change.amax(1))
            regrown[row:] = torch.maximum(regrown[row:], (change * gone).amax(1))
            died[row:] = gone[:, -1]
            ends = ends_of_block
        if not regrown.max().item() * ROUNDING_A_STEP / KICK <= tol:
            self._check_rounding(tol)
        apart = _far(ends, self.ends)
        largest, left = torch.maximum(worst, apart) / size, apart / size
        if not exact:
            largest, left = largest.maximum(largest[0]), left.maximum(left[0])
        return Gain(largest[1:], left[1:], self.plan.length)

    def _check_rounding(self, tol: float) -> None:
        """Give up where rounding alone grows too large: outputs blind to the state for a while look as if it died."""
        largest = [change.max().item() for _, change, _ in self._kicked_run(self.h0, self.starts)]
        rounding = max(largest, key=lambda each: math.inf if math.isnan(each) else each) * ROUNDING_A_STEP / KICK
        if not rounding <= tol:
            raise GiveUp(f"rounding may grow to {rounding:.1e} inside a chunk")

    def _kicked_run(self, first: State, others: State) -> Iterator[tuple[int, Tensor, State]]:
        """Of a second run with kicks: the first row of each block, the change in each step, the states after it."""
        table = self._table()
        state: State = tuple(part.flatten(1, 2) for part in others)
        for row, begin, end in self.plan.segments(LONG_BLOCK):
            if begin < self.plan.warmup:
                continue
            state = self._join(state, row, begin, first)
            y, state = self._advance_kicked(_kicked(self._inputs(row, begin, end)), state, begin)
            kept = table[row:, begin - self.plan.warmup : end - self.plan.warmup]
            yield row, y.sub_(kept).abs_().flatten(2).amax(2), self._split(state)

    def _advance_kicked(self, inputs: Tensor, state: State, begin: int) -> tuple[Tensor, State]:
        """Advance chunks and move their states after each block, each time by other signs."""
        pieces = []
        for part in inputs.split(_BLOCK, dim=1):
            y, state = self._advance(part, state)
            begin += part.shape[1]
            state = tuple(_kicked(each, seed=begin) for each in state)
            pieces.append(y)
        return torch.cat(pieces, dim=1), state

    def _blocks_from(self, step: int, block: int) -> Iterator[tuple[int, int]]:
        end = self.plan.warmup + self.plan.length
        for begin in range(step, end, block):
            yield begin, min(end, begin + block)


class Gain(NamedTuple):
    """Changes per change of a chunk's start state, one for each chunk."""

    largest: Tensor  # of a kept output or the end state
    left: Tensor  # of the end state
    steps: int  # after which it was left

    def with_another(self, other: "Gain") -> "Gain":
        """Those of the chunks of both."""
        largest, left = torch.cat([self.largest, other.largest]), torch.cat([self.left, other.left])
        return Gain(largest, left, max(self.steps, other.steps))

    def rounding(self, a_step: float, plan: Plan) -> float:
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


def _kicked(values: Tensor, seed: int = 1) -> Tensor:
    """Numbers moved by ± `KICK` eps of the largest, by the same signs along dimension 0; symbols stay as they are."""
    if not values.is_floating_point():
        return values
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, values.shape[1:], generator=generator).to(values) * 2 - 1
    return values + signs * (KICK * torch.finfo(values.dtype).eps * values.abs().max().item())


def perturbed(state: State, tol: float) -> State:
    """The state moved by ± max(tol, 1000 eps), relative to its size: far above rounding, within the linear range."""
    generator = torch.Generator().manual_seed(0)

    def move(part: Tensor) -> Tensor:
        signs = torch.randint(0, 2, part.shape, generator=generator).to(part) * 2 - 1
        return part + signs * max(tol, 1000 * torch.finfo(part.dtype).eps) * max(1.0, part.abs().max().item())

    return tuple(move(part) for part in state)


def _replace(parts: State, index: Tensor, new: State) -> State:
    return tuple(part.index_copy(1, index, fresh.to(part)) for part, fresh in zip(parts, new, strict=True))
