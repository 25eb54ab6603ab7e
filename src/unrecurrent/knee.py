"""Where more of the past stops paying: feed-forward models at half a window, at it, and at twice it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, Literal

from scipy.special import stdtrit

from unrecurrent.models import Settings, find_model_class

#: how sure a difference must be to lie above, or below, what it is compared with
CONFIDENCE = 0.975

Place = Literal["where predicted", "earlier", "later", "cannot tell"]


@dataclass(frozen=True)
class Trained:
    """A model of the look-back table, trained once a seed; losses are mean squared errors."""

    name: str
    settings: Settings
    #: how many steps a prediction can depend on (`None`: all)
    reach: int | None
    results: Sequence[dict[str, Any]]

    @property
    def label(self) -> str:
        return self.name if self.reach is None else f"{self.name} {self.reach}"

    @property
    def recurrent(self) -> bool:
        return find_model_class(self.name).recurrent

    def losses(self, split: str) -> list[float]:
        return [result[f"{split}_loss"] for result in self.results]

    def mean(self, split: str) -> float:
        return mean(self.losses(split))

    def error(self, split: str) -> float:
        """The standard error of the mean over seeds, 0 where there is one seed."""
        losses = self.losses(split)
        return stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0


@dataclass(frozen=True)
class Knee:
    """What one kind of feed-forward model loses at half the window and gains at twice it, on the test part."""

    name: str
    lost_at_half: float | None
    gained_at_double: float
    place: Place
    text: str


def judge_all(checked: Sequence[Trained], delta: float) -> Iterator[Knee]:
    """Yield the knee of each kind of feed-forward model among those trained at half a window, at it and at twice it."""
    for name in ("window", "tcn"):
        models = sorted((m for m in checked if m.name == name), key=lambda m: m.reach or 0)
        yield judge(models[0] if len(models) == 3 else None, models[-2], models[-1], delta)


def judge(half: Trained | None, at: Trained, double: Trained, delta: float) -> Knee:
    """Return where the knee of a kind of feed-forward model lies, from its test losses at three windows."""
    gained, gained_width = _relative(at, double)
    lost, lost_width = _relative(half, at) if half else (math.inf, 0.0)
    seeds = min(len(model.results) for model in (half or at, at, double))
    # One seed shows no spread, and a difference without its error proves nothing.
    place: Place = place_of(lost, lost_width, gained, gained_width, delta) if seeds > 1 else "cannot tell"
    changes = [f"{_changed(half, at)} with {half.reach}"] if half else []
    changes.append(f"{_changed(double, at)} with {double.reach}")
    finding = {
        "where predicted": "the knee is where it was predicted",
        "earlier": "its knee is earlier than predicted",
        "later": "its knee is later than predicted",
        "cannot tell": f"whether the knee is there cannot be told {_from(seeds)}",
    }[place]
    text = f"Check with {at.name}, test part, against {at.reach} steps: {' and '.join(changes)}; {finding}."
    return Knee(at.name, lost if half else None, gained, place, text)


def _from(seeds: int) -> str:
    return f"with {seeds} seeds" if seeds > 1 else "from one seed (three or more show the spread)"


def _changed(model: Trained, reference: Trained) -> str:
    change = model.mean("test") / reference.mean("test") - 1
    return f"the error is {abs(change):.1%} {'larger' if change > 0 else 'smaller'}"


def place_of(lost: float, lost_width: float, gained: float, gained_width: float, delta: float) -> Place:
    """Return where a knee lies by the rules in `RULES`; widths are those of half a confidence interval.

    >>> place_of(0.2, 0.01, 0.005, 0.01, delta=0.01), place_of(0.2, 0.01, 0.1, 0.01, delta=0.01)
    ('where predicted', 'later')
    >>> place_of(-0.03, 0.01, 0.0, 0.01, delta=0.01), place_of(0.02, 0.03, 0.0, 0.01, delta=0.01)
    ('earlier', 'cannot tell')
    """
    if gained - gained_width > delta:
        return "later"
    if lost - lost_width > delta:
        return "where predicted"
    return "earlier" if lost + lost_width <= delta else "cannot tell"


def _relative(shorter: Trained, longer: Trained) -> tuple[float, float]:
    """Return by how much the shorter window is worse, in parts of the longer one's test loss, and by how much that may
    be wrong: half an interval by Welch's t over the seeds, which is wide where these are few."""
    short, long = shorter.mean("test"), longer.mean("test")
    variances = (shorter.error("test") / long) ** 2, (short * longer.error("test") / long**2) ** 2
    if not any(variances):
        return short / long - 1, 0.0
    counts = len(shorter.results), len(longer.results)
    parts = [v**2 / max(1, n - 1) for v, n in zip(variances, counts, strict=True)]
    freedom = sum(variances) ** 2 / sum(parts)
    return short / long - 1, float(stdtrit(freedom, CONFIDENCE)) * math.sqrt(sum(variances))
