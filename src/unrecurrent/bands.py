"""Numbers measured on samples, and how sure they are: curves against a lag with bootstrap bands."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

RESAMPLES = 1_000
COVERAGE = 0.95


@lru_cache(maxsize=4)
def resampling_weights(count: int) -> np.ndarray:
    """Return the weights (resamples, count) of a bootstrap of `count` samples: read-only, the same at each call."""
    weights = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    weights.flags.writeable = False
    return weights


def band_of_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bootstrap band of the mean of each row of `values` (rows, samples); NaN counts as no sample.

    >>> low, high = band_of_means(np.array([[1.0, 3.0, np.nan]]))
    >>> float(low[0]), float(high[0])
    (1.0, 3.0)
    """
    weights, present = resampling_weights(values.shape[1]), ~np.isnan(values)
    sums = weights @ np.where(present, values, 0.0).T
    shares = weights @ present.T
    means = np.where(shares > 0, sums / np.where(shares > 0, shares, 1), np.nan)
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail], axis=0)
    return low, high


@dataclass(frozen=True, eq=False)
class Decay:
    """A quantity against the lag, on samples: `values[i, n]` at `lags[i]` in sample n, NaN where it was not seen.

    >>> decay = Decay((1, 2, 4), np.array([[1.0, 3.0], [0.2, 0.4], [0.0, 0.1]]))
    >>> decay.worst.tolist(), decay.settled(0.4)
    ([3.0, 0.4, 0.1], 2)
    """

    lags: tuple[int, ...]
    values: np.ndarray

    @classmethod
    def of(cls, lags: Sequence[int], values: np.ndarray) -> "Decay":
        """Keep the lags seen in at least one sample."""
        seen = ~np.isnan(values).all(1)
        return cls(tuple(int(lag) for lag, one in zip(lags, seen, strict=True) if one), values[seen])

    @property
    def mean(self) -> np.ndarray:
        return np.nanmean(self.values, 1)

    @property
    def median(self) -> np.ndarray:
        return np.nanmedian(self.values, 1)

    @property
    def worst(self) -> np.ndarray:
        return np.nanmax(self.values, 1)

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray]:
        """The bootstrap band of the mean at each lag."""
        return band_of_means(self.values)

    def settled(self, level: float) -> int | None:
        """The smallest lag from which on no sample is above `level`; None if the longest still is."""
        found = None
        for lag, worst in zip(reversed(self.lags), reversed(self.worst), strict=True):
            if worst > level:
                break
            found = lag
        return found

    def to_dict(self) -> dict[str, Any]:
        """The curve as plain lists, ready for JSON."""
        low, high = self.band
        return {
            "lags": list(self.lags),
            "mean": self.mean.tolist(),
            "low": low.tolist(),
            "high": high.tolist(),
            "median": self.median.tolist(),
            "worst": self.worst.tolist(),
            "samples": self.values.shape[1],
        }


def spread_lags(longest: int) -> tuple[int, ...]:
    """Every lag up to 16, then eight an octave, up to `longest`.

    >>> spread_lags(24)
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24)
    """
    lags = list(range(1, min(longest, 16) + 1))
    while lags[-1] < longest:
        octave = 1 << (lags[-1].bit_length() - 1)
        lags.append(min(longest, lags[-1] + max(1, octave // 8)))
    return tuple(lags)
