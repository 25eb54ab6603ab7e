"""How many past inputs a trained model uses: measured, with a band, on the task's own loss.

Everything here is an estimate from data. What can be proved about a model is in `certificate.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unrecurrent.errors import InputError

Pair = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]

#: most model steps (batch × time) in one call: bounds the memory whatever the data's length
STEPS_A_CALL = 65_536
#: steps of a long sequence read at once by models that carry a cache
PIECE = 512
RESAMPLES = 1_000
COVERAGE = 0.95


@dataclass(frozen=True)
class MemoryProfile:
    """An estimate of a model's memory: its loss when each prediction sees only the last k inputs.

    `losses[j, p]` is the loss at sampled position `p` with the last `ks[j]` inputs, `full_losses[p]` with all.
    """

    ks: tuple[int, ...]
    losses: np.ndarray
    full_losses: np.ndarray

    @property
    def full(self) -> float:
        """The mean loss with the whole past."""
        return float(self.full_losses.mean())

    @property
    def curve(self) -> list[tuple[int, float, float, float]]:
        """The truncation curve: `(k, mean, low, high)` with the bootstrap band of the mean."""
        low, high = self._band(self.losses)
        rows = zip(self.ks, self.losses.mean(axis=1), low, high, strict=True)
        return [(k, float(mean), float(below), float(above)) for k, mean, below, above in rows]

    def k(self, delta: float = 0.01) -> int | None:
        """Return k*(δ): the smallest measured k from which on the loss stays within `delta` (relative) of the full one.

        `None`: not even the largest measured k is enough.
        """
        return _smallest_k(self.ks, self.losses.mean(axis=1), self.full, delta)

    def k_band(self, delta: float = 0.01) -> tuple[int | None, int | None]:
        """Return the bootstrap band of `k(delta)`; an upper end of `None` is beyond the largest measured k."""
        weights = self._resamples()
        means, fulls = weights @ self.losses.T, weights @ self.full_losses
        found = [_smallest_k(self.ks, m, f, delta) for m, f in zip(means, fulls, strict=True)]
        ordered = sorted(found, key=lambda k: np.inf if k is None else k)
        tail = (1 - COVERAGE) / 2
        return ordered[int(tail * len(ordered))], ordered[int((1 - tail) * len(ordered)) - 1]

    def to_dict(self, delta: float = 0.01) -> dict[str, Any]:
        """Return the curve, the full level and k*(δ) with their bands, ready for JSON."""
        ks, mean, low, high = (list(column) for column in zip(*self.curve, strict=True))
        (full_low,), (full_high,) = self._band(self.full_losses[None])
        k_low, k_high = self.k_band(delta)
        return {
            "label": "estimate",
            "positions": len(self.full_losses),
            "ks": ks,
            "mean": mean,
            "low": low,
            "high": high,
            "full": self.full,
            "full_low": float(full_low),
            "full_high": float(full_high),
            "delta": delta,
            "k_star": self.k(delta),
            "k_star_low": k_low,
            "k_star_high": k_high,
        }

    def _resamples(self) -> np.ndarray:
        """Return the weights `(resamples, positions)` of a bootstrap of the positions, the same at each call."""
        count = len(self.full_losses)
        return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES) / count

    def _band(self, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tail = 100 * (1 - COVERAGE) / 2
        low, high = np.percentile(self._resamples() @ losses.T, [tail, 100 - tail], axis=0)
        return low, high


def _smallest_k(ks: Sequence[int], means: np.ndarray, full: float, delta: float) -> int | None:
    """Return the smallest of `ks` such that it and all larger ones are within `delta` of `full`."""
    found = None
    for k, mean in sorted(zip(ks, means, strict=True), reverse=True):
        if mean > full + delta * abs(full):
            break
        found = k
    return found


def measure_memory(
    model: nn.Module,
    data: Sequence[Pair],
    loss_fn: LossFunction,
    *,
    ks: Sequence[int] | None = None,
    longest: int = 2048,
    positions: int = 2048,
    delta: float = 0.01,
    seed: int = 0,
) -> MemoryProfile:
    """Measure the loss of a causal model when each prediction sees only the last k inputs.

    For a sampled position t the model is run from its zero state on `x[t−k+1 … t]` (on all there is where
    t < k) and its last output is scored: `L(k) = mean_t loss(f(x[t−k+1 … t]), y_t)`, the truncation of Miller
    and Hardt (ICLR 2019, section 3), on the same positions for every k. `L(full)` reads each sequence from
    its start. Without `ks`, powers of two up to the longest sequence (at most `longest`) are measured, then
    the integers between are bisected until k*(`delta`) is exact where the curve falls monotonically.

    Args:
        model: maps inputs `(B, T)` or `(B, T, D)` to outputs `(B, T, O)`, causally and from a zero state; a model
            with `init_cache` and `advance` is read in pieces, so that memory does not grow with the data.
        data: pairs of inputs `(T, …)` and targets `(T, …)`.
        loss_fn: maps outputs `(B, T, O)` and targets `(B, T, …)` to the loss of every step, `(B, T)`.
        ks: the truncation lengths to measure.
        longest: the largest k measured where `ks` is not given and sequences are longer.
        positions: how many positions to sample (all, if there are fewer).
        delta: the relative loss by which k* is defined.
        seed: seed of the sample.

    Raises:
        InputError: no data, or a loss that is not one number a step.

    >>> delay = lambda x: torch.roll(x, 2, dims=1) * (torch.arange(x.shape[1]) >= 2)[None, :, None]
    >>> x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    >>> y = torch.roll(x, 2, dims=0) + 0.1
    >>> squared = lambda output, target: (output - target).square().sum(-1)
    >>> measure_memory(delay, [(x[2:], y[2:])], squared).k(0.01)
    3
    """
    if not data or all(len(inputs) == 0 for inputs, _ in data):
        raise InputError("there is nothing to measure: the data hold no sequence with at least one step")
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        measure = _Truncation(model, data, loss_fn, positions, seed)
        full = measure.full()
        measured = {k: measure.at(k) for k in (ks or _powers_of_two(_longest(data, longest)))}
        if ks is None:
            _bisect(measured, full, measure.at, delta)
    finally:
        if training:
            model.train()
    order = tuple(sorted(measured))
    return MemoryProfile(order, np.stack([measured[k] for k in order]), full)


def _longest(data: Sequence[Pair], limit: int) -> int:
    return min(limit, max(len(inputs) for inputs, _ in data))


def _powers_of_two(longest: int) -> list[int]:
    ks = [1]
    while 2 * ks[-1] < longest:
        ks.append(2 * ks[-1])
    return [*ks, longest] if longest > ks[-1] else ks


def _bisect(measured: dict[int, np.ndarray], full: np.ndarray, at: Callable[[int], np.ndarray], delta: float) -> None:
    """Measure integers between the last k that fails and the first that passes until they are neighbours."""
    while True:
        ks = sorted(measured)
        means = np.array([measured[k].mean() for k in ks])
        passing = _smallest_k(ks, means, float(full.mean()), delta)
        failing = max((k for k in ks if passing is not None and k < passing), default=None)
        if passing is None or failing is None or passing - failing <= 1:
            return
        middle = (passing + failing) // 2
        measured[middle] = at(middle)


class _Truncation:
    """The sampled positions of a data set, and the losses there at any truncation length."""

    def __init__(self, model: nn.Module, data: Sequence[Pair], loss_fn: LossFunction, count: int, seed: int):
        self.model, self.data, self.loss_fn = model, data, loss_fn
        parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
        self.device = parameter.device if parameter is not None else data[0][0].device
        lengths = np.array([len(inputs) for inputs, _ in data])
        chosen = np.random.default_rng(seed).permutation(lengths.sum())[:count]
        chosen.sort()
        ends = lengths.cumsum()
        self.sequence = np.searchsorted(ends, chosen, side="right")
        self.time = chosen - (ends - lengths)[self.sequence]

    @torch.no_grad()
    def at(self, k: int) -> np.ndarray:
        """Return the loss at every sampled position when only the last `k` inputs are seen."""
        losses = np.empty(len(self.time))
        for chunk in self._chunks(k):
            windows = [self._window(p, k) for p in chunk]
            lasts = torch.tensor([len(w) - 1 for w in windows])
            outputs = self.model(pad_sequence(windows, batch_first=True).to(self.device))
            outputs = outputs[torch.arange(len(chunk)), lasts.to(outputs.device)]
            targets = torch.stack([self.data[self.sequence[p]][1][self.time[p]] for p in chunk])
            losses[chunk] = self._loss(outputs[:, None], targets[:, None].to(self.device))[:, 0]
        return losses

    def _chunks(self, k: int) -> Iterator[np.ndarray]:
        """Yield positions with windows of similar length, so that little is computed on padding."""
        order = np.argsort(np.minimum(self.time + 1, k), kind="stable")
        size = max(1, STEPS_A_CALL // k)
        for start in range(0, len(order), size):
            yield order[start : start + size]

    def _window(self, position: int, k: int) -> Tensor:
        inputs, end = self.data[self.sequence[position]][0], int(self.time[position]) + 1
        return inputs[max(0, end - k) : end]

    def full(self) -> np.ndarray:
        """Return the loss at every sampled position when the whole past is seen."""
        losses = np.empty(len(self.time))
        for group in self._sequence_groups():
            for start, loss in self._pieces(group):
                for row, sequence in enumerate(group):
                    here = (self.sequence == sequence) & (self.time >= start)
                    here &= self.time < start + loss.shape[1]
                    losses[here] = loss[row, self.time[here] - start]
        return losses

    def _sequence_groups(self) -> Iterator[list[int]]:
        """Yield the sampled sequences in groups of equal length, as many as fit one call."""
        by_length: dict[int, list[int]] = {}
        for sequence in np.unique(self.sequence).tolist():
            by_length.setdefault(len(self.data[sequence][0]), []).append(sequence)
        for length, group in by_length.items():
            size = max(1, STEPS_A_CALL // min(length, PIECE))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    @torch.no_grad()
    def _pieces(self, group: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(start, losses (B, T))` along sequences of equal length read from their start."""
        inputs = torch.stack([self.data[s][0] for s in group]).to(self.device)
        targets = torch.stack([self.data[s][1] for s in group]).to(self.device)
        advance, init_cache = getattr(self.model, "advance", None), getattr(self.model, "init_cache", None)
        if advance is None or init_cache is None:
            yield 0, self._loss(self.model(inputs), targets)
            return
        cache = init_cache(len(group))
        for start in range(0, inputs.shape[1], PIECE):
            outputs, cache = advance(inputs[:, start : start + PIECE], cache)
            yield start, self._loss(outputs, targets[:, start : start + PIECE])

    @torch.no_grad()
    def _loss(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        loss = self.loss_fn(outputs, targets)
        if loss.shape != outputs.shape[:2]:
            raise InputError(
                f"loss_fn must give the loss of every step, shape {tuple(outputs.shape[:2])},"
                f" not {tuple(loss.shape)}: use reduction='none' and sum over the features"
            )
        return loss.double().cpu().numpy()
