"""What a parallel run was asked for, and what it showed about its own answer."""

import numbers
import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from unrecurrent.certificate import Certificate
from unrecurrent.engines import StepCost
from unrecurrent.errors import InputError, is_whole

Verify = Literal["pilot", "outputs"]


class Options(NamedTuple):
    tol: float
    chunks: int | Literal["auto"]
    warmup: int | Literal["auto"]
    verify: Verify
    certificate: Certificate | None
    budget: float = 1.0  # share of a sequential run of its own that one sequence of a batch may cost
    attempt_share: float = 0.48  # of that: what may be spent before all boundaries agree
    cost: StepCost | None = None  # where it is known already

    @classmethod
    def checked(cls, tol: Any, chunks: Any, warmup: Any, verify: Any, certificate: Any) -> "Options":
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
        faster = max(self.estimated_speedup, 1e-9)
        proved = "" if self.bound is None else f", every output within {self.bound:.1e} and rounding (proved)"
        gain = "" if self.gain is None else f", gain {self.gain:.2g} on {self.gain_chunks} chunks (measured)"
        return (
            f"parallel: {self.chunks} chunks after {self.warmup} steps of warm-up, mismatch {self.max_mismatch:.1e}"
            f"{gain}{proved}, sweeps {self.sweeps}, depth {self.sequential_depth} of {self.steps} steps, "
            f"about {max(faster, 1 / faster):.1f} times {'faster' if faster >= 1 else 'slower'}"
        )


def sequential_evidence(steps: int, options: Options, reason: str, begun: float) -> Evidence:
    """The evidence of a run by the module itself, after an attempt that began at `begun` and was given up."""
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


def merged(evidences: list[Evidence]) -> Evidence:
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
