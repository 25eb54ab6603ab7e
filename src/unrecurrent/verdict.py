"""The verdict: does the task need a recurrent model? Derived from the numbers by stated rules."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import Any, Literal

from scipy.special import stdtrit

#: a feed-forward model within this fraction of the recurrent one is as good for practical purposes
MARGIN = 0.01
CONFIDENCE = 0.95

RULES = (
    "The best recurrent and the best feed-forward model are chosen by their mean validation metric and judged by"
    " their test metric.",
    f"No: with {CONFIDENCE:.0%} confidence (one-sided, Welch's t over the seeds) the feed-forward model is worse by"
    f" less than {MARGIN:.0%} of the recurrent model's metric, or better.",
    f"Yes: with {CONFIDENCE:.0%} confidence the feed-forward model is worse by more than {MARGIN:.0%}.",
    "The confidence is about training again from other seeds on the same data, not about other test data.",
    "Cannot tell: anything else, and whenever there are fewer than two seeds, one of the two kinds is missing, or"
    f" neither is more than {MARGIN:.0%} better than the best answer that reads nothing, where the task knows it.",
)


@dataclass(frozen=True)
class Candidate:
    """What the verdict looks at in one model; metrics are one number a seed."""

    name: str
    recurrent: bool
    valid: Sequence[float]
    test: Sequence[float]
    receptive_field: int | None
    k_star: int | None
    score_speed: float | None
    #: whether the truncation curve, and with it k*, was measured at all
    measured: bool = True


@dataclass(frozen=True)
class Verdict:
    """The answer, one paragraph that says why, and the rules it follows from."""

    answer: Literal["no", "yes", "cannot tell"]
    text: str
    rules: tuple[str, ...] = RULES

    def to_dict(self) -> dict[str, Any]:
        return {"answer": self.answer, "text": self.text, "rules": list(self.rules)}


def decide(
    candidates: Sequence[Candidate], metric: Mapping[str, str], step_noun: str, chance: float | None = None
) -> Verdict:
    """Return the verdict over trained models; `chance` is the metric of the best answer that reads nothing.

    >>> def candidate(name, recurrent, test, reach=None):
    ...     return Candidate(name, recurrent, test, test, reach, 9, 1e4 if recurrent else 3e4)
    >>> metric = {"direction": "lower", "unit": "nats a chord"}
    >>> models = [candidate("lstm", True, [8.50, 8.51, 8.49]), candidate("tcn", False, [8.40, 8.41, 8.39], 15)]
    >>> decide(models, metric, "chord").answer
    'no'
    """
    sign = 1 if metric["direction"] == "lower" else -1
    recurrent = _best([c for c in candidates if c.recurrent], sign)
    forward = _best([c for c in candidates if not c.recurrent], sign)
    if recurrent is None or forward is None:
        missing = "recurrent" if recurrent is None else "feed-forward"
        return Verdict("cannot tell", f"Cannot tell: no {missing} model was compared; add one to --models.")
    gap = _Gap.between(recurrent, forward, sign)
    figures = _figures(recurrent, forward, metric["unit"])
    untaught = [c for c in (recurrent, forward) if _reads_nothing(c, sign, chance)]
    if len(untaught) == 2:
        return Verdict("cannot tell", _untaught(figures, chance))
    if recurrent in untaught:  # what it uses says nothing then
        recurrent = replace(recurrent, measured=False)
    verdict = _decided(recurrent, forward, gap, figures, step_noun)
    for each in untaught:
        nothing = f" The {each.name} has not learned the task in this training (who reads nothing gets {chance:.4g})."
        verdict = replace(verdict, text=verdict.text + nothing)
    return verdict


def _reads_nothing(candidate: Candidate, sign: int, chance: float | None) -> bool:
    """Whether a model is no better than the best answer that reads nothing, as far as the task knows that."""
    return chance is not None and sign * (chance - mean(candidate.test)) <= MARGIN * abs(chance)


def _decided(recurrent: Candidate, forward: Candidate, gap: "_Gap", figures: str, step_noun: str) -> Verdict:
    if gap.half_width is None:
        return Verdict("cannot tell", f"Cannot tell with {_seeds(recurrent, forward)}: {figures}.")
    if gap.relative + gap.half_width < MARGIN:
        return Verdict("no", _no(recurrent, forward, gap, figures, step_noun))
    if gap.relative - gap.half_width > MARGIN:
        return Verdict("yes", _yes(recurrent, forward, gap, figures, step_noun))
    return Verdict("cannot tell", _cannot_tell(recurrent, forward, gap, figures))


@dataclass(frozen=True)
class _Gap:
    """By which fraction the feed-forward model is worse, and the half-width of its confidence interval."""

    relative: float
    half_width: float | None

    @classmethod
    def between(cls, recurrent: Candidate, forward: Candidate, sign: int) -> "_Gap":
        scale = abs(mean(recurrent.test)) or 1.0
        relative = sign * (mean(forward.test) - mean(recurrent.test)) / scale
        if min(len(recurrent.test), len(forward.test)) < 2:
            return cls(relative, None)
        variances = [stdev(c.test) ** 2 / len(c.test) for c in (recurrent, forward)]
        error = math.sqrt(sum(variances))
        if error == 0.0:
            return cls(relative, 0.0)
        parts = [v**2 / (len(c.test) - 1) for v, c in zip(variances, (recurrent, forward), strict=True)]
        freedom = sum(variances) ** 2 / sum(parts)
        return cls(relative, float(stdtrit(freedom, CONFIDENCE)) * error / scale)


def _best(candidates: Sequence[Candidate], sign: int) -> Candidate | None:
    return min(candidates, key=lambda c: sign * mean(c.valid), default=None)


def _figures(recurrent: Candidate, forward: Candidate, unit: str) -> str:
    def figure(c: Candidate) -> str:
        middle = mean(c.test)
        # Three digits behind the point, and at least three that say something: some losses come close to zero.
        decimals = max(3, 2 - math.floor(math.log10(abs(middle)))) if middle else 3
        spread = f" ± {stdev(c.test):.{decimals}f}" if len(c.test) > 1 else ""
        return f"{c.name} {middle:.{decimals}f}{spread}"

    return f"{figure(recurrent)} against {figure(forward)} {unit}"


def _seeds(recurrent: Candidate, forward: Candidate) -> str:
    count = min(len(recurrent.test), len(forward.test))
    return f"{count} seed{'s' if count != 1 else ''}"


def _uses(recurrent: Candidate, noun: str) -> str:
    if not recurrent.measured:
        return ""
    if recurrent.k_star is None:
        return f"The {recurrent.name} uses more {noun}s than were measured; "
    if recurrent.k_star == 1:
        return f"The {recurrent.name} uses the last {noun} alone; "
    return f"The {recurrent.name} uses the last {recurrent.k_star} {noun}s; "


def _reach(forward: Candidate, noun: str) -> str:
    if forward.receptive_field is None:
        return f"a {forward.name} that can see all"
    return f"a {forward.name} that can see {forward.receptive_field} {noun}{'s' if forward.receptive_field > 1 else ''}"


def _times(recurrent: Candidate, forward: Candidate) -> str:
    if not recurrent.score_speed or not forward.score_speed:
        return ""
    ratio = forward.score_speed / recurrent.score_speed
    if ratio >= 1.05:
        return f" and scores {ratio:.1f} times as fast"
    return f" but scores {1 / ratio:.1f} times as slowly" if ratio <= 0.95 else " and scores as fast"


def _no(recurrent: Candidate, forward: Candidate, gap: _Gap, figures: str, noun: str) -> str:
    quality = "is better" if gap.relative + (gap.half_width or 0) < 0 else "is as good"
    times = _times(recurrent, forward)
    return _sentence("No.", f"{_uses(recurrent, noun)}{_reach(forward, noun)} {quality} ({figures}){times}.")


def _yes(recurrent: Candidate, forward: Candidate, gap: _Gap, figures: str, noun: str) -> str:
    text = f"{_uses(recurrent, noun)}{_reach(forward, noun)} is worse by {gap.relative:.1%} ({figures})."
    text = _sentence("Yes.", text)
    reach = forward.receptive_field
    if recurrent.measured and reach is not None and (recurrent.k_star is None or reach < recurrent.k_star):
        text += " It sees less than the recurrent model uses: a wider receptive field may change the answer."
    return text


def _sentence(answer: str, text: str) -> str:
    return f"{answer} {text[0].upper()}{text[1:]}"


def _untaught(figures: str, chance: float | None) -> str:
    return (
        f"Cannot tell: neither has learned the task ({figures}; who reads nothing gets {chance:.4g})."
        " Train longer, or with other settings."
    )


def _cannot_tell(recurrent: Candidate, forward: Candidate, gap: _Gap, figures: str) -> str:
    low, high = gap.relative - (gap.half_width or 0), gap.relative + (gap.half_width or 0)
    return (
        f"Cannot tell with {_seeds(recurrent, forward)}: {figures}; the difference of the"
        f" {forward.name} lies between {low:+.1%} and {high:+.1%} (positive is worse), and {MARGIN:.0%} is the margin."
        " More seeds narrow the interval."
    )
