"""How many chunks, after which warm-up: from a cost model of the machine and what the module forgets in a pilot."""

import numpy as np
import torch
from torch import Tensor

from unrecurrent.chunks import LONG_BLOCK, GiveUp, Ledger, NotWorthIt, Plan, TryAPart
from unrecurrent.engines import Engine, ModuleEngine, State, StepCost, step_cost
from unrecurrent.evidence import Options
from unrecurrent.stock import is_stock

PILOT_BLOCK = 16
_PILOT_HISTORY = 32
_PILOT_ROWS = 16
CHECKED_SHARE = 0.8  # of the sequential run: what may be spent in all once the boundaries agree
_PILOT_SHARE = 0.05
_COMPARED = 1.25  # of a run: what it takes where its inputs are moved and all of its outputs compared
_MOST_ROWS = 4096


def decide(engine: Engine, plain: ModuleEngine, x: Tensor, options: Options) -> tuple[Plan, Ledger, float | None]:
    """Choose warm-up and chunks: what was given, else from the cost model and what the model forgets in a pilot."""
    steps, batch = len(x), x.shape[1]
    if options.chunks != "auto" and (options.chunks == 1 or steps < 2):
        raise NotWorthIt("one chunk is the sequential run")
    ledger = Ledger()
    if options.chunks == "auto":
        cost = options.cost or step_cost(engine, plain, x)
        proof = options.certificate if is_stock(plain.module) else None
        runs_twice = options.verify == "outputs" and not (proof is not None and proof.stable)
        most = options.budget * cost.sequential * steps
        ledger = Ledger(cost, options.attempt_share * most, CHECKED_SHARE * most, runs_twice)
    rate = None
    warmup = options.warmup
    if warmup == "auto":
        warmup, rate = forgetting(engine, x, options, ledger)
    chunks = options.chunks
    if chunks == "auto":
        assert ledger.cost is not None
        chunks = _cheapest_chunks(steps, batch, warmup, ledger.cost)
    plan = Plan.cut(steps, chunks, warmup)
    if plan.chunks < 2:
        raise NotWorthIt("one chunk is the sequential run")
    if _predicted(plan, batch, ledger) > ledger.limit:
        raise TryAPart(plan.warmup, rate, ledger)
    return plan, ledger, rate


def _predicted(plan: Plan, batch: int, ledger: Ledger) -> float:
    """What the run will have cost by the model; raises `NotWorthIt` where that is too much even if it holds."""
    if ledger.cost is None:
        return 0.0
    run, again = _seconds(plan, batch, ledger.cost, ledger.runs_twice)
    total = ledger.spent + run
    if total + again > ledger.checked_limit:
        raise NotWorthIt(f"a warm-up of {plan.warmup} steps, or more, would save too little")
    return total


def _seconds(plan: Plan, batch: int, cost: StepCost, runs_twice: bool) -> tuple[float, float]:
    """What a run costs by the model, and what its check does where that is a second run."""
    a_step = cost.batched(plan.chunks * batch)
    return (plan.warmup + plan.length) * a_step, plan.length * a_step * _COMPARED if runs_twice else 0.0


def left_for_the_rest(reason: TryAPart, part: int, rest: int, batch: int) -> float:
    """What a part of the steps leaves for the rest, in sequential runs of it; raises `reason` where that is too little.

    All that is spent on the first attempt, the part and the rest stays within what a checked run may cost.
    """
    ledger, cost = reason.ledger, reason.ledger.cost
    assert cost is not None

    def seconds(steps: int) -> float:
        plan = Plan.cut(steps, _cheapest_chunks(steps, batch, reason.warmup, cost), reason.warmup)
        return sum(_seconds(plan, batch, cost, ledger.runs_twice))

    left = ledger.checked_limit - ledger.spent - seconds(part)
    if seconds(rest) > left:
        raise reason
    return left / (CHECKED_SHARE * cost.sequential * rest)


def _cheapest_chunks(steps: int, batch: int, warmup: int, cost: StepCost) -> int:
    """Minimise (warmup + T/C)(fixed + per_row C B) over C: C² = T fixed / (warmup per_row B)."""
    best = (steps * cost.fixed / (max(1, warmup) * cost.per_row * batch)) ** 0.5
    most = min(steps // 2, max(2, _MOST_ROWS // batch))
    return max(2, min(most, round(best)))


def forgetting(engine: Engine, x: Tensor, options: Options, ledger: Ledger) -> tuple[int, float]:
    """How many steps a few windows of x need to forget a zero start state to a quarter of tol, and the rate a step."""
    if len(x) < 2 * PILOT_BLOCK:
        raise NotWorthIt(f"{len(x)} steps are too few to see what the module forgets: give warmup as well")
    pilot = Pilot(engine, x, ledger)
    first = apart = pilot.apart()
    lag, target = 0, options.tol / 4
    while not apart <= target:
        before = apart
        if lag + PILOT_BLOCK > pilot.longest:
            if pilot.longest < pilot.room:
                raise NotWorthIt(f"to see whether the module forgets takes more than {lag} steps, which cost too much")
            raise GiveUp(f"the module still remembers its start state after {lag} steps (by {apart:.1e})")
        block = pilot.next_block(lag)
        pilot.advance_pair(block)
        apart, lag = pilot.apart(), lag + block
        if ledger.cost is not None:
            chunks = _cheapest_chunks(len(x), x.shape[1], lag, ledger.cost)
            _predicted(Plan.cut(len(x), chunks, lag), x.shape[1], ledger)
        if not np.isfinite(apart):
            raise GiveUp("the states do not stay finite")
    if lag == 0:
        return 0, 0.0
    rate = (max(apart, 1e-30) / first) ** (1 / lag)
    rounding = torch.finfo(pilot.dtype).eps * pilot.size() / max(1 - rate, 1e-12)
    if rounding > options.tol:
        raise GiveUp(f"rounding alone would reach {rounding:.1e}, more than tol: use float64 or a larger tol")
    inside = np.log(before / target) / np.log(before / max(apart, 1e-30))
    exact = lag - block * (1 - inside)
    return int(1.25 * exact) + 3, rate


class Pilot:
    """A few windows of x, each from a state the module reached and, beside it, from the zero state."""

    def __init__(self, engine: Engine, x: Tensor, ledger: Ledger) -> None:
        self.engine, self.x, self.ledger, self.batch = engine, x, ledger, x.shape[1]
        windows = max(2, -(-_PILOT_ROWS // self.batch))
        rows = windows * self.batch
        history = min(_PILOT_HISTORY, max(PILOT_BLOCK, len(x) // 64)) // PILOT_BLOCK * PILOT_BLOCK
        self.room = len(x) // 4
        self.longest = self._longest(2 * rows)
        last = max(0, len(x) - history - self.longest)
        self.at = torch.linspace(0, last, windows, device=x.device).long()
        state = engine.zero_state(rows)
        for _ in range(history // PILOT_BLOCK):
            state = self._advance(state, PILOT_BLOCK, copies=1)
        self.dtype = state[0].dtype
        zeros = engine.zero_state(rows)
        self.state: State = tuple(torch.cat([part, zero], dim=1) for part, zero in zip(state, zeros, strict=True))

    def _longest(self, rows: int) -> int:
        """Lags to try: a quarter of the sequence and, where the cost is known, a share of a sequential run."""
        cost = self.ledger.cost
        if cost is None:
            return self.room
        return min(self.room, int(_PILOT_SHARE * cost.sequential * len(self.x) / cost.batched(rows)))

    def _advance(self, state: State, steps: int, copies: int) -> State:
        index = self.at + torch.arange(steps, device=self.x.device)[:, None]
        block = self.x[index].flatten(1, 2)
        self.at = self.at + steps
        self.ledger.charge(steps, block.shape[1] * copies)
        return self.engine.advance(torch.cat([block] * copies, dim=1), state)[1]

    def next_block(self, lag: int) -> int:
        """An eighth of the steps so far, between bounds: looking after every few would cost more than the steps do.

        `forgetting` asks while a block of the least size is left.
        """
        return min(max(PILOT_BLOCK, lag // 8), LONG_BLOCK, self.longest - lag)

    def advance_pair(self, steps: int) -> None:
        self.state = self._advance(self.state, steps, copies=2)

    def apart(self) -> float:
        half = self.state[0].shape[1] // 2
        return max((part[:, :half] - part[:, half:]).abs().max().item() for part in self.state)

    def size(self) -> float:
        return max(1.0, *(part.abs().max().item() for part in self.state))
