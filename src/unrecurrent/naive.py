"""What a series is forecast as without any model: its last value, the value one season before, or its mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unrecurrent.tasks.series import SeriesTask
from unrecurrent.tasks.task import SPLITS, Split


@dataclass(frozen=True)
class Baseline:
    """A forecast without a model and its loss; `season` in steps where it has one."""

    name: str
    valid: float
    test: float
    season: int | None = None

    @property
    def label(self) -> str:
        return self.name if self.season is None else f"{self.name} {self.season}"


def baselines(task: SeriesTask) -> list[Baseline]:
    """Return the baselines of a series task, on exactly the steps its models are scored on.

    Forecasting: `last-value`, ŷ_{t+h} = y_t, and `seasonal-naive`, ŷ_{t+h} = y_{t+h−s⌈h/s⌉}, the value at the same
    place of the last whole season seen (Hyndman and Athanasopoulos, *Forecasting: Principles and Practice*,
    section 5.2); the season s ≥ 2 is the one with the smallest error on the training part, at most the longest
    window considered. They may look back before the start of a part, which the models cannot. With horizon 0:
    `training-mean`.
    """
    if task.horizon == 0:
        return [Baseline("training-mean", _mean_loss(task, "valid"), _mean_loss(task, "test"))]
    season = best_season(task)
    rows = [Baseline("last-value", seasonal_loss(task, "valid", 1), seasonal_loss(task, "test", 1))]
    if season is not None:
        valid, test = (seasonal_loss(task, split, season) for split in ("valid", "test"))
        rows.append(Baseline("seasonal-naive", valid, test, season))
    return rows


def _mean_loss(task: SeriesTask, split: Split) -> float:
    """Return the loss of predicting zero, which is the mean of the training part."""
    targets = np.concatenate([series.parts[split].targets for series in task.series])
    return float(np.square(targets).mean())


def best_season(task: SeriesTask) -> int | None:
    """Return the season from 2 to the longest window whose naive forecast is best on the training part."""
    seasons = range(2, task.longest + 1)
    losses = {season: seasonal_loss(task, "train", season) for season in seasons}
    return min(losses, key=lambda s: losses[s]) if losses else None


def seasonal_loss(task: SeriesTask, split: Split, season: int) -> float:
    """Return the mean squared error of the seasonal-naive forecast on a part, over steps and horizons.

    Forecasts that reach back before the first row of a series are left out (in the training part alone).
    """
    lags = [season * -(-h // season) for h in range(1, task.horizon + 1)]
    total, count = 0.0, 0
    for values, start in _histories(task, split):
        steps = len(values) - start - task.horizon  # as many as the models are scored on
        for h, lag in enumerate(lags, 1):
            first = max(start + h, lag)
            ends = values[first : start + h + steps]
            errors = ends - values[first - lag : first - lag + len(ends)]
            total, count = total + float(np.square(errors).sum()), count + len(ends)
    return total / count


def _histories(task: SeriesTask, split: Split) -> Sequence[tuple[np.ndarray, int]]:
    """Return, for each series, all values up to the end of a part and the index at which the part starts."""
    before = SPLITS[: SPLITS.index(split)]
    found = []
    for series in task.series:
        past = [series.parts[earlier].targets[:, 0] for earlier in before]
        found.append((np.concatenate([*past, series.parts[split].targets[:, 0]]), sum(map(len, past))))
    return found
