"""Whether the chunks of a parallel run agree: mismatch, certificate or gain, and sweeps over those that do not."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unrecurrent.cells import StackedCell
from unrecurrent.certificate import Certificate, Proof
from unrecurrent.chunks import Attempt, Gain, GiveUp, Plan
from unrecurrent.engines import State, largest_sum
from unrecurrent.evidence import Options
from unrecurrent.stock import is_stock

_GAIN_CHUNKS = 8


class Carry(NamedTuple):
    """How far off the start state of a span may be: measured, and (with a certificate) proved by component."""

    mismatch: float = 0.0
    error: Tensor | None = None
    #: whether it is the true one, or may still change by what others find out
    exact: bool = True

    @property
    def uncertain(self) -> bool:
        return self.mismatch > 0 or not self.exact


class Check:
    """Mismatch, then certificate or gain, then sweeps until every error is within the tolerance."""

    def __init__(self, attempt: Attempt, options: Options, carry: Carry) -> None:
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
        self.allowed = options.tol  # of it, what errors of start states may take

    def run(self) -> None:
        self._agree(None)
        self.attempt.ledger.limit = self.attempt.ledger.checked_limit
        certificate = self._certificate()
        if certificate is not None:
            assert certificate.rate is not None
            rounding = max(self._rounding_a_step()) / (1 - certificate.rate)
            self._prove(certificate, self.options.tol - rounding)
            if self._proved_error() + rounding <= self.options.tol:
                self.error = self._proved_error() + rounding
                return
            self.note = "the proved bound and rounding exceed tol: the gain was measured as well"
        gain = self._measured_gain()
        rounding = self._rounding(gain)
        if not rounding <= self.options.tol:
            raise GiveUp(f"rounding alone may grow to {rounding:.1e}, more than tol: use float64 or a larger tol")
        self.allowed = self.options.tol - rounding
        self._agree(gain)
        self.error = self._errors(gain).max().item() + rounding
        if self.error > self.options.tol:
            raise GiveUp(
                f"the errors of the boundaries and rounding add up to {self.error:.1e}"
                if self.carry.mismatch <= self.options.tol
                else f"the start state of this span is uncertain by {self.carry.mismatch:.1e}"
            )
        if certificate is not None:
            self._prove(certificate, self.options.tol)

    def _rounding(self, gain: Gain) -> float:
        """What rounding may add up to in an output or an end state.

        What is left at the end of a chunk is not known below what the kicks of a run over all outputs leave, and so how
        long rounding is remembered only as "at most": there the sums of large inputs count once.
        """
        of_states, of_sums = self._rounding_a_step()
        if self.options.verify == "outputs":
            once = of_sums * max(1.0, gain.largest.max().item())
            return max(gain.rounding(of_states, self.attempt.plan), once)
        return gain.rounding(max(of_states, of_sums), self.attempt.plan)

    def _rounding_a_step(self) -> tuple[float, float]:
        """How far a step of the batched run and one of the module itself may differ: an eps of states, and of sums."""
        states = (*self.attempt.starts, *self.attempt.ends)
        largest = [part.detach().abs().max().item() for part in states]
        hidden = max(1.0, largest[0], largest[len(self.attempt.starts)])
        eps = torch.finfo(states[0].dtype).eps
        return eps * max(1.0, *largest), eps * largest_sum(self.attempt.module, self.attempt.x, hidden)

    def _proved_error(self) -> float:
        """What is proved about the outputs and the final state together."""
        if self.bound is None or self.end_error is None:
            return math.inf
        return max(self.bound, float(self.end_error.max()))

    def _agree(self, gain: Gain | None) -> None:
        """Sweep the chunks whose error exceeds the tolerance until there are none (without a gain: their mismatch)."""
        failing = self._failing(gain)
        while len(failing):
            self.attempt.sweep(failing)
            self.sweeps += 1
            self.mismatch = self.attempt.mismatch().detach()
            left = self._failing(gain)
            if len(left) > max(len(failing) // 2, min(len(failing) - 1, len(self.mismatch) // 8)):
                raise GiveUp(f"{len(left)} of {len(self.mismatch) + 1} chunks do not come to agree")
            failing = left

    def _failing(self, gain: Gain | None) -> Tensor:
        error = self.mismatch if gain is None else self._errors(gain)[1:]
        return torch.nonzero(~(error <= self.allowed) & (self.mismatch != 0)).flatten() + 1

    def _errors(self, gain: Gain) -> Tensor:
        """For chunks 0, 1, …: gain × error of the start state, which is mismatch + what is left of the one before."""
        start, errors = self.carry.mismatch, [self.carry.mismatch]
        for mismatch, left in zip(self.mismatch.tolist(), gain.left.tolist(), strict=True):
            start = mismatch + left * start
            errors.append(start)
        largest = torch.cat([gain.largest.max()[None], gain.largest]).clamp(min=1.0)
        return torch.tensor(errors).to(largest) * largest

    def _measured_gain(self) -> Gain:
        """The gain of chunks 1, 2, …: for each of them the largest of a pilot, or of all chunks."""
        attempt, tol = self.attempt, self.options.tol
        others = attempt.plan.chunks - 1
        with torch.no_grad():
            if self.options.verify == "outputs":
                gain = attempt.gain_of_all(tol, exact=not self.carry.uncertain)
            else:
                some = torch.linspace(1, others, min(others, _GAIN_CHUNKS), device=self.mismatch.device)
                gain = attempt.gain_of_some(some.round().long(), tol)
                if self.carry.uncertain:  # chunk 0 starts from a state that a run before left so
                    gain = gain.with_another(attempt.gain_of_first(tol))
        self.gain, self.gain_chunks = gain.largest.max().item(), len(gain.largest)
        self.left = gain.left.max().item()
        # One direction of change says little of a single chunk: the largest of all chunks is taken for each.
        return Gain(gain.largest.max().expand(others), gain.left.max().expand(others), gain.steps)

    def _certificate(self) -> Certificate | None:
        """The certificate, where its assumptions hold for these inputs and this start state."""
        certificate = self.options.certificate
        if certificate is None:
            return None
        if not is_stock(self.attempt.module):
            self.note = "the certificate is about layers as torch runs them, not as this module does: measured instead"
            return None
        if self.carry.mismatch > 0 and self.carry.error is None:
            self.note = "how far off the start state of this span may be was measured, so that nothing is proved"
            return None
        if certificate.stable and certificate.holds_for(self.attempt.x.detach(), self._packed(self.attempt.h0)):
            return certificate
        self.note = "the certificate does not hold for these inputs and this start state: measured instead"
        return None

    def _prove(self, certificate: Certificate, enough: float) -> None:
        errors = self._boundary_errors(certificate)
        bound, self.end_error = _propagated(certificate, errors, self.attempt.plan, enough)
        self.bound = bound if math.isfinite(bound) else None

    def _packed(self, state: State) -> Any:
        return state[0] if len(state) == 1 else state

    def _boundary_errors(self, certificate: Certificate) -> Tensor:
        """What the start states of chunks may be off by, component by component: a row for each boundary."""
        starts = tuple(part.detach().flatten(1, 2) for part in self.attempt.starts)
        ends = tuple(part[:, :-1].detach().flatten(1, 2) for part in self.attempt.ends)
        apart = certificate.flatten(self._packed(starts)) - certificate.flatten(self._packed(ends))
        errors = apart.double().abs().cpu()
        return errors if self.carry.error is None else torch.cat([errors, self.carry.error[None]])


class _Bound(NamedTuple):
    """What is proved: about every output, and about the end state, component by component."""

    outputs: float
    end: Tensor

    @property
    def largest(self) -> float:
        return max(self.outputs, float(self.end.max()))


def _propagated(certificate: Certificate, errors: Tensor, plan: Plan, enough: float) -> _Bound:
    """Bounds from the errors at the boundaries: the first that is small enough, else the best of what proofs say.

    With v the largest error at a boundary, component by component or in the norms of the proof, T the error propagator
    and T^n(v) ≤ θ v over a chunk, every start state is within v / (1 - θ), since e_c = T^L(e_{c-1}) + mismatch_c, and
    the output n steps on within T^n(v) / (1 - θ). T is monotone and homogeneous, so once T^J(v) ≤ θ' v the later steps
    repeat the first J, shrunk, and need no computing. None do where v is a multiple of the weights w of the proof, for
    T(w) ≤ rate · w.
    """
    cell = certificate.cell
    assert cell is not None
    if not errors.any():
        return _Bound(0.0, errors.amax(0))
    proofs = [proof for proof in certificate.proofs if proof.contracts]
    at_once = min((_at_once(proof, cell, errors, plan) for proof in proofs), key=lambda bound: bound.largest)
    if at_once.largest <= enough:
        return at_once
    return min((at_once, *(_step_by_step(proof, cell, errors, plan) for proof in proofs)), key=lambda b: b.largest)


def _at_once(proof: Proof, cell: StackedCell, errors: Tensor, plan: Plan) -> _Bound:
    """From the multiple of the proof's weights that covers the errors, T^n of which is at most rate^n times it."""
    weights = proof.weights
    if not math.isfinite(float(weights.max() / weights.min())):
        return _nothing(cell)
    w = (proof.pack(errors, cell.sizes).amax(0) / weights).max() * weights
    theta = proof.rate**plan.shortest
    start = proof.components(w / (1 - theta))
    return _Bound(proof.rate * cell.hidden(start).max().item(), theta * start)


def _step_by_step(proof: Proof, cell: StackedCell, errors: Tensor, plan: Plan) -> _Bound:
    """From the errors as they are, which may grow before they shrink; nothing where they do not come to shrink."""
    v = proof.pack(errors, cell.sizes).amax(0)
    v = v.clamp(min=1e-3 * v.max().item())
    e, worst_hidden, growth = v, 0.0, 1.0
    for _ in range(plan.shortest):
        e = proof.propagator.propagate(e)
        worst_hidden = max(worst_hidden, cell.hidden(proof.components(e)).max().item())
        shrink, growth = (e / v).max().item(), max(growth, (e / v).max().item())
        if shrink * growth <= 0.5:
            break
    theta = shrink * growth
    if not theta < 1:
        return _nothing(cell)
    return _Bound(worst_hidden / (1 - theta), proof.components(v) * (theta / (1 - theta)))


def _nothing(cell: StackedCell) -> _Bound:
    return _Bound(math.inf, torch.full((cell.state_size,), math.inf, dtype=torch.float64))
