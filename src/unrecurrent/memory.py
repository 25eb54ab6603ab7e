"""How many past inputs a trained model uses: measured, with a band, on the task's own loss and in its own layers.

Everything here is an estimate from data. What can be proved about a model is in `certificate.py`; where there is a
certificate it stands beside the estimates.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from unrecurrent.bands import COVERAGE, Decay, band_of_means, resampling_weights, spread_lags
from unrecurrent.certificate import Certificate
from unrecurrent.errors import InputError, checked_whole
from unrecurrent.layer_memory import LANES, LayerMemory, NotSeen, measure_layer
from unrecurrent.progress import progress_bars
from unrecurrent.reading import Piece, Reader
from unrecurrent.trajectories import Tap, Wanted, choose_segments, find_taps

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Pair = tuple[Tensor, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Say = Callable[[str, float], None]

#: most model steps (batch × time) in one call: bounds the memory whatever the data's length
STEPS_A_CALL = 65_536
#: the gradient is followed this many steps back, on this many sampled predictions
GRADIENT_LAGS = 512
GRADIENT_SAMPLES = 32
#: differences of the hidden state that count as forgotten, as certificates use them
FORGOTTEN = (1e-2, 1e-3)


@dataclass(frozen=True, eq=False, repr=False)
class MemoryProfile:
    """An estimate of a model's memory: its loss when each prediction sees only the last k inputs.

    `losses[j, p]` is the loss at sampled position `p` with the last `ks[j]` inputs, `full_losses[p]` with all. Beside
    this truncation curve stand, where they could be measured, `gradient_decay` (‖∂ loss_{t+j} / ∂ x_t‖ against j; of a
    random mixture of the outputs where `scale` is given) and one `LayerMemory` for each recurrent layer: forgetting
    curve, local rates, Lyapunov exponents, certificate.

    >>> losses = np.array([[0.9, 0.7], [0.5, 0.5], [0.4, 0.4]])
    >>> profile = MemoryProfile(ks=(1, 2, 4), losses=losses, full_losses=np.array([0.4, 0.4]))
    >>> profile.k(0.01), profile.k(0.5)
    (4, 2)
    """

    ks: tuple[int, ...]
    losses: np.ndarray
    full_losses: np.ndarray
    gradient_decay: Decay | None = None
    layers: tuple[LayerMemory, ...] = ()
    scale: float | None = None
    """What δ is a share of; None: the size of the full loss."""
    exponential: bool = False
    """δ is a share of exp(loss), as a perplexity is judged."""
    context: int | None = None
    """"Full" means at least this many inputs, because the model could not be read at once; None: all."""
    notes: tuple[str, ...] = ()
    """Sentences on what was not measured, and why."""

    @property
    def full(self) -> float:
        """The mean loss with the whole past."""
        return float(self.full_losses.mean())

    @property
    def curve(self) -> list[tuple[int, float, float, float]]:
        """The truncation curve: `(k, mean, low, high)` with the bootstrap band of the mean."""
        low, high = band_of_means(self.losses)
        rows = zip(self.ks, self.losses.mean(axis=1), low, high, strict=True)
        return [(k, float(mean), float(below), float(above)) for k, mean, below, above in rows]

    def k(self, delta: float = 0.01) -> int | None:
        """Return k*(δ): the smallest measured k from which on the loss stays within `delta` (relative) of the full one.

        `None`: not even the largest measured k is enough.
        """
        return _smallest_k(self.ks, self.losses.mean(axis=1), self.full, self._allowance(delta))

    def _allowance(self, delta: float) -> Callable[[float], float]:
        return partial(_allowed, delta, self.scale, self.exponential)

    def k_band(self, delta: float = 0.01) -> tuple[int | None, int | None]:
        """Return the bootstrap band of `k(delta)`; an upper end of `None` is beyond the largest measured k."""
        weights = resampling_weights(len(self.full_losses))
        means, fulls = weights @ self.losses.T, weights @ self.full_losses
        allowance = self._allowance(delta)
        found = [_smallest_k(self.ks, m, f, allowance) for m, f in zip(means, fulls, strict=True)]
        ordered = sorted(found, key=lambda k: np.inf if k is None else k)
        tail = (1 - COVERAGE) / 2
        return ordered[int(tail * len(ordered))], ordered[int((1 - tail) * len(ordered)) - 1]

    @property
    def lyapunov(self) -> list[tuple[float, float, float]]:
        """The Lyapunov exponents of all recurrent layers a step, largest first: `(mean, low, high)`."""
        rows = [row for layer in self.layers for row in layer.lyapunov]
        return sorted(rows, reverse=True)

    @property
    def forgetting(self) -> Decay | None:
        """The forgetting curve of the recurrent layer; of several, that of the one that forgets last."""
        if not self.layers:
            return None
        return max((layer.forgetting for layer in self.layers), key=lambda decay: float(decay.worst[-1]))

    @property
    def certificates(self) -> list[Certificate]:
        """What is proved about the recurrent layers, for inputs like those seen."""
        return [layer.certificate for layer in self.layers if layer.certificate is not None]

    def verdict(self, delta: float = 0.01) -> str:
        """Return in words whether a window could replace the recurrence, and what that rests on."""
        return "; ".join(_verdict(self, delta))

    def plot(self) -> "Figure":
        """Return the measurements as one plotly figure: `.show()` it, or `.write_html(path)`."""
        from unrecurrent.memory_charts import figure

        return figure(self)

    def to_html(self, title: str = "Memory") -> str:
        """Return a section of HTML with numbers, charts (plotly.js is expected on the page) and the verdict."""
        from unrecurrent.memory_charts import section

        return section(self, title)

    def save_report(self, path: Path, title: str = "Memory") -> None:
        """Write a page of its own that needs no network."""
        from unrecurrent.memory_charts import page

        page({title: self}, Path(path), title)

    def to_dict(self, delta: float = 0.01) -> dict[str, Any]:
        """Return all measurements with their bands, and k*(δ), ready for JSON."""
        ks, mean, low, high = (list(column) for column in zip(*self.curve, strict=True))
        (full_low,), (full_high,) = band_of_means(self.full_losses[None])
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
            "scale": self.scale,
            "exponential": self.exponential,
            "context": self.context,
            "gradient_decay": None if self.gradient_decay is None else self.gradient_decay.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "verdict": self.verdict(delta),
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        (full_low,), (full_high,) = band_of_means(self.full_losses[None])
        shown = "cannot be found up to" if self.k() is None else f"= {self.k():,} {_span(self.k_band())} of at most"
        seen = "the whole past" if self.context is None else f"at least {self.context:,} inputs"
        lines = [
            f"MemoryProfile (estimates on {len(self.full_losses):,} predictions, bands {COVERAGE:.0%})",
            f"  loss with {seen}: {self.full:.6g} [{full_low:.6g}, {full_high:.6g}]",
            f"  k*(1 %) {shown} {self.ks[-1]:,} inputs",
        ]
        if self.gradient_decay is not None:
            lines.append(f"  gradient: {_gradient_in_words(self.gradient_decay)}")
        for layer in self.layers:
            lines += ["  " + line for line in repr(layer).splitlines()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes), f"  {self.verdict()}"])


def _span(band: tuple[int | None, int | None]) -> str:
    low, high = ("more" if k is None else f"{k:,}" for k in band)
    return f"[{low}, {high}]"


def _gradient_in_words(decay: Decay) -> str:
    mean = decay.mean
    below = next((lag for lag, value in zip(decay.lags, mean, strict=True) if value <= mean[0] / 100), None)
    if below is None:
        return f"still {mean[-1] / max(mean[0], 1e-300):.2g} of its size after {decay.lags[-1]:,} steps back"
    return f"falls to 1 % of its size {below:,} steps back"


def _verdict(profile: MemoryProfile, delta: float) -> Iterator[str]:
    """Yield the parts of the verdict: whether the very numbers need the recurrence, then what the loss needs."""
    decay, (small, smaller) = profile.forgetting, FORGOTTEN
    if decay is not None:
        settled = decay.settled(smaller)
        yield (
            f"states forget their start to {smaller:g} within {settled:,} steps on these data (estimate)"
            if settled is not None
            else "keep the recurrence where its very numbers matter: started from another state, the hidden state still"
            f" differs by {float(decay.worst[-1]):.2g} after {decay.lags[-1]:,} steps (estimate)"
        )
    proved = [certificate.horizon(small) for certificate in profile.certificates]
    if len(profile.layers) == 1 and proved and proved[0] is not None:
        yield (
            "proved of the recurrent layer, for inputs of its own in the range seen here: leaving out those more than"
            f" {proved[0]:,} steps back changes its state by at most {small:g}"
        )
    yield _window_in_words(profile, delta)


def _window_in_words(profile: MemoryProfile, delta: float) -> str:
    k, longest = profile.k(delta), profile.ks[-1]
    if k is None:
        return f"even the last {longest:,} inputs are not enough on average: keep the recurrence (estimate)"
    if k == longest and len(profile.ks) > 1:
        return f"no window shorter than the longest measured, {longest:,} inputs, is enough on average (estimate)"
    inputs = f"the last {k:,} input{'s' * (k > 1)} {_span(profile.k_band(delta))}"
    if profile.scale is None:
        what = "exponential of the loss" if profile.exponential else "loss"
        return f"on average {inputs} keep the {what} within {delta:.2g} of itself (estimate)"
    largest = float(profile.losses[profile.ks.index(k)].max()) ** 0.5
    return (
        f"on average {inputs} keep the outputs within {delta:.2g} of their variance, but those of a single step change"
        f" by up to {largest:.2g}, as a root mean square (estimate)"
    )


def _allowed(delta: float, scale: float | None, exponential: bool, full: float) -> float:
    """Return by how much a loss may exceed `full`."""
    if exponential:
        return math.log1p(delta)
    return delta * (abs(full) if scale is None else scale)


def _smallest_k(ks: Sequence[int], means: np.ndarray, full: float, allowance: Callable[[float], float]) -> int | None:
    """Return the smallest of `ks` such that it and all larger ones exceed `full` by no more than is allowed."""
    found, most = None, full + allowance(full)
    for k, mean in sorted(zip(ks, means, strict=True), reverse=True):
        if mean > most:
            break
        found = k
    return found


def measure_memory(
    model: nn.Module,
    data: Iterable[Pair],
    loss_fn: LossFunction,
    *,
    ks: Sequence[int] | None = None,
    longest: int = 2048,
    positions: int = 1024,
    delta: float = 0.01,
    seed: int = 0,
    scale: float | None = None,
    exponential: bool = False,
    masks: Sequence[Tensor] | None = None,
    layers: bool = True,
    exponents: int | Literal["all"] = 16,
    steps: int = 10_000,
    progress: bool = False,
) -> MemoryProfile:
    """Measure how much of the past a causal model uses: in its loss, its gradients and its recurrent layers.

    Truncation curve: for a sampled position t the model is run from its zero state on `x[t−k+1 … t]` (on all there is
    where t < k) and its last output is scored: `L(k) = mean_t loss(f(x[t−k+1 … t]), y_t)`, the truncation of Miller
    and Hardt (ICLR 2019, section 3), on the same positions for every k. `L(full)` reads each sequence from
    its start. Without `ks`, powers of two up to the longest sequence (at most `longest`) are measured, then
    the integers between are bisected until k*(`delta`) is exact where the curve falls monotonically.

    The recurrent layers inside (torch's own, `StableLSTM`, `CellLayer`, or a `recurrent` model with a cache) are
    measured along trajectories on the inputs that reach them; `docs/measuring.md` says how.

    Args:
        model: maps inputs `(B, T)` or `(B, T, D)` to outputs `(B, T, O)`, causally and from a zero state; a model
            with `init_cache` and `advance` is read in pieces, so that memory does not grow with the data.
        data: pairs of inputs `(T, …)` and targets `(T, …)`, tensors or arrays; float64 becomes float32 where the
            model's weights are.
        loss_fn: maps outputs `(B, T, O)` and targets `(B, T, …)` to the loss of every step, `(B, T)`.
        ks: the truncation lengths to measure.
        longest: the largest k measured where `ks` is not given and sequences are longer; also the longest lag.
        positions: how many positions to sample (all, if there are fewer).
        delta: the relative loss by which k* is defined.
        seed: seed of the sample.
        scale: what `delta` is a share of, for losses whose full value says nothing (default: the full loss).
        exponential: `delta` is a share of exp(loss): for a loss in nats that is judged as a perplexity.
        masks: which steps of each sequence count, bool `(T,)` (default: all); positions are sampled among these.
        layers: whether to measure gradients and recurrent layers as well.
        exponents: how many Lyapunov exponents to compute, or "all".
        steps: over how many steps they are averaged.
        progress: whether to show a bar on stderr.

    Raises:
        InputError: no data, missing values, a setting out of range, a model that is not causal (tried, not assumed), or
            a loss that is not one finite number a step.

    >>> delay = lambda x: torch.roll(x, 2, dims=1) * (torch.arange(x.shape[1]) >= 2)[None, :, None]
    >>> x = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    >>> y = torch.roll(x, 2, dims=0) + 0.1
    >>> squared = lambda output, target: (output - target).square().sum(-1)
    >>> measure_memory(delay, [(x[2:], y[2:])], squared).k(0.01)
    3
    """
    counts = {"longest": longest, "positions": positions, "steps": steps}
    _check_settings(ks, counts, delta=delta, exponents=exponents, seed=seed)
    data = _pairs(data, model)
    _check(data)
    _check_masks(masks, data)
    with _evaluating(model), _progress(progress) as say:
        sample = _Sample(model, data, loss_fn, masks, positions, seed)
        sample.reader.check_causal(max((inputs for inputs, _ in data), key=len))
        _check_scale(scale)  # last, since the variance of outputs that are NaN is none either
        taps, notes = find_taps(model) if layers else ([], [])
        wanted = choose_segments(
            sample.lengths, sample.reader, _steps_kept(steps, longest), _lane_length(data, longest), seed
        )
        full = sample.full(taps, wanted, say)
        first = _powers_of_two(_longest(data, longest)) if ks is None else [int(k) for k in ks]
        measured = {k: sample.at(k, say) for k in first}
        if ks is None:
            _bisect(measured, full, lambda k: sample.at(k, say), partial(_allowed, delta, scale, exponential))
        gradient = sample.gradient(min(longest, GRADIENT_LAGS), scale is None, say) if layers else None
        if layers and gradient is None:
            notes.append("not measured: the decay of gradients, because the loss has no derivative by the inputs")
        lags = spread_lags(_longest(data, longest))
        seen = []
        for tap in taps:
            try:
                seen.append(measure_layer(tap, lags, exponents, steps, say))
            except NotSeen as error:
                notes.append(f"not measured: the layer {tap.name!r} {error}")
    order = tuple(sorted(measured))
    contexts = [c for c in map(sample.reader.context, sample.lengths.values()) if c is not None]
    curve = np.stack([measured[k] for k in order])
    context = min(contexts, default=None)
    return MemoryProfile(order, curve, full, gradient, tuple(seen), scale, exponential, context, tuple(notes))


def _check_settings(
    ks: Sequence[int] | None,
    counts: Mapping[str, int],
    *,
    delta: float,
    exponents: int | Literal["all"],
    seed: int,
) -> None:
    if ks is not None and not len(ks):
        raise InputError("ks is empty: give the truncation lengths to measure, or leave it out")
    for k in () if ks is None else ks:
        checked_whole("each of ks", k, 1)
    for name, value in counts.items():
        checked_whole(name, value, 1)
    checked_whole("seed", seed, 0)
    if exponents != "all":
        checked_whole("exponents", exponents, 0)
    if not (isinstance(delta, Real) and 0 <= delta < math.inf):
        raise InputError(f"delta must be a share of the loss, 0 or more, not {delta}")


def _check_scale(scale: float | None) -> None:
    if scale is not None and not (isinstance(scale, Real) and 0 <= scale < math.inf):
        raise InputError(f"scale must be what delta is a share of, 0 or more, not {scale}")


def _pairs(data: Iterable[Any], model: Any) -> list[Pair]:
    """Return the data as pairs of tensors, those in float64 as float32 where the model's weights are."""
    pairs = list(data) if isinstance(data, Iterable) else [data]
    weights = list(model.parameters()) if isinstance(model, nn.Module) else []
    narrow = any(w.dtype == torch.float32 for w in weights) and all(w.dtype != torch.float64 for w in weights)

    def tensor(values: Any) -> Tensor:
        try:
            made = torch.as_tensor(values)
        except (TypeError, ValueError) as error:
            raise InputError(f"data must be numbers, not {values.dtype}: convert them") from error
        return made.float() if narrow and made.dtype == torch.float64 else made

    def is_pair(pair: Any) -> bool:
        kinds = (Tensor, np.ndarray)
        return isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, kinds) and x.ndim for x in pair)

    if not all(map(is_pair, pairs)):
        raise InputError(
            "data must be pairs of inputs (T, ...) and targets (T, ...), tensors or arrays: for one sequence write"
            " [(inputs, targets)]"
        )
    return [(tensor(inputs), tensor(targets)) for inputs, targets in pairs]


def _check(data: Sequence[Pair]) -> None:
    if not data or all(len(inputs) == 0 for inputs, _ in data):
        raise InputError("there is nothing to measure: the data hold no sequence with at least one step")
    for number, (inputs, targets) in enumerate(data):
        if len(inputs) != len(targets):
            raise InputError(
                f"sequence {number} has {len(inputs)} inputs but {len(targets)} targets: give one target for each step"
            )
        for name, own, first in (("inputs", inputs, data[0][0]), ("targets", targets, data[0][1])):
            if (own.shape[1:], own.dtype) != (first.shape[1:], first.dtype):
                raise InputError(
                    f"the {name} of sequence {number} are {tuple(own.shape[1:])} of {own.dtype} a step, those of"
                    f" sequence 0 {tuple(first.shape[1:])} of {first.dtype}: give all in one form"
                )
        if inputs.is_floating_point() and not inputs.isfinite().all():
            raise InputError(f"the inputs of sequence {number} hold NaN or infinite values: fill or remove them first")


def _check_masks(masks: Sequence[Tensor] | None, data: Sequence[Pair]) -> None:
    if masks is None:
        return
    if [mask.shape for mask in masks] != [inputs.shape[:1] for inputs, _ in data]:
        raise InputError("masks do not fit the data: give one mask (T,) for each sequence (T, ...)")
    if not any(bool(mask.any()) for mask in masks):
        raise InputError("there is nothing to measure: no step counts by the masks given")


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, and each module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _progress(shown: bool) -> Iterator[Say]:
    """Yield what moves a bar: call it with what is being done and the share of it that is done."""
    with progress_bars(quiet=not shown) as bars:
        bar = bars.add_task("measuring", total=1.0, info="")

        def say(what: str, fraction: float) -> None:
            bars.update(bar, description=f"{what:<28}", completed=fraction)

        yield say


def _mixture(outputs: Tensor) -> Tensor:
    """A random direction of unit length in the outputs (B, T, O), the same at each call: (B, T)."""
    direction = torch.randn(outputs.shape[-1], generator=torch.Generator().manual_seed(0)).to(outputs)
    return outputs @ (direction / direction.norm())


def _longest(data: Sequence[Pair], limit: int) -> int:
    return min(limit, max(len(inputs) for inputs, _ in data))


def _lane_length(data: Sequence[Pair], longest: int) -> int:
    return _longest(data, max(longest, 512))


def _steps_kept(steps: int, longest: int) -> int:
    return max(steps + LANES * 200, LANES * longest)


def _powers_of_two(longest: int) -> list[int]:
    ks = [1]
    while 2 * ks[-1] < longest:
        ks.append(2 * ks[-1])
    return [*ks, longest] if longest > ks[-1] else ks


def _bisect(
    measured: dict[int, np.ndarray],
    full: np.ndarray,
    at: Callable[[int], np.ndarray],
    allowance: Callable[[float], float],
) -> None:
    """Measure integers between the last k that fails and the first that passes until they are neighbours."""
    while True:
        ks = sorted(measured)
        means = np.array([measured[k].mean() for k in ks])
        passing = _smallest_k(ks, means, float(full.mean()), allowance)
        failing = max((k for k in ks if passing is not None and k < passing), default=None)
        if passing is None or failing is None or passing - failing <= 1:
            return
        middle = (passing + failing) // 2
        measured[middle] = at(middle)


class _Sample:
    """The sampled positions of a data set, and the losses there at any truncation length."""

    def __init__(
        self,
        model: nn.Module,
        data: Sequence[Pair],
        loss_fn: LossFunction,
        masks: Sequence[Tensor] | None,
        count: int,
        seed: int,
    ):
        self.model, self.data, self.loss_fn = model, data, loss_fn
        parameter = next(iter(model.parameters()), None) if isinstance(model, nn.Module) else None
        self.device = parameter.device if parameter is not None else data[0][0].device
        self.reader = Reader(model, self.device)
        lengths = np.array([len(inputs) for inputs, _ in data])
        counting = lengths.sum() if masks is None else torch.cat(list(masks)).cpu().numpy().nonzero()[0]
        chosen = np.random.default_rng(seed).permutation(counting)[:count]
        chosen.sort()
        ends = lengths.cumsum()
        self.sequence = np.searchsorted(ends, chosen, side="right")
        self.time = chosen - (ends - lengths)[self.sequence]
        self.reader.try_on(data[int(lengths.argmax())][0])

    @cached_property
    def lengths(self) -> dict[int, int]:
        """The sampled sequences and their lengths."""
        return {sequence: len(self.data[sequence][0]) for sequence in np.unique(self.sequence).tolist()}

    @torch.no_grad()
    def at(self, k: int, say: Say) -> np.ndarray:
        """Return the loss at every sampled position when only the last `k` inputs are seen."""
        losses = np.empty(len(self.time))
        done = 0
        for chunk in self._chunks(k):
            windows = [self._window(p, k) for p in chunk]
            lasts = torch.tensor([len(w) - 1 for w in windows])
            outputs = self.reader.run(pad_sequence(windows, batch_first=True).to(self.device))
            outputs = outputs[torch.arange(len(chunk)), lasts.to(outputs.device)]
            targets = torch.stack([self.data[self.sequence[p]][1][self.time[p]] for p in chunk])
            losses[chunk] = self._loss(outputs[:, None], targets[:, None].to(self.device))[:, 0]
            done += len(chunk)
            say(f"the last {k:,} inputs", done / len(losses))
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

    @torch.no_grad()
    def full(self, taps: Sequence[Tap], wanted: dict[int, list[Wanted]], say: Say) -> np.ndarray:
        """Return the loss at every sampled position when the whole past is seen; the taps keep what is wanted."""
        losses = np.empty(len(self.time))
        total, done = sum(self.lengths.values()), 0
        for group in self._sequence_groups():
            carried = self.reader.carries(self.lengths[group[0]])
            with ExitStack() as listening:
                for tap in taps:
                    listening.enter_context(tap.listening())
                for piece in self.reader.read([self.data[s][0] for s in group]):
                    for tap in taps:
                        tap.take(group, piece, wanted, carried)
                    self._score(group, piece, losses)
                    done += len(group) * (piece.first + piece.outputs.shape[1] - piece.new)
                    say("the whole past", done / total)
        for tap in taps:
            tap.finish()
        return losses

    def _score(self, group: Sequence[int], piece: Piece, losses: np.ndarray) -> None:
        """Note the losses of the sampled positions in a piece, and of these only: a large readout costs most of all."""
        end = piece.first + piece.outputs.shape[1]
        for row, sequence in enumerate(group):
            here = (self.sequence == sequence) & (self.time >= piece.new) & (self.time < end)
            times = torch.from_numpy(self.time[here])
            if not len(times):
                continue
            outputs = piece.outputs[row, (times - piece.first).to(self.device)]
            targets = self.data[sequence][1][times].to(self.device)
            losses[here] = self._loss(outputs[:, None], targets[:, None])[:, 0]

    def _sequence_groups(self) -> Iterator[list[int]]:
        """Yield the sampled sequences in groups of equal length, as many as fit one call."""
        by_length: dict[int, list[int]] = {}
        for sequence, length in self.lengths.items():
            by_length.setdefault(length, []).append(sequence)
        for length, group in by_length.items():
            size = max(1, STEPS_A_CALL // self.reader.steps_a_call(length))
            for start in range(0, len(group), size):
                yield group[start : start + size]

    @torch.no_grad()
    def _loss(self, outputs: Tensor, targets: Tensor) -> np.ndarray:
        loss = self.loss_fn(outputs, targets)
        if not isinstance(loss, Tensor) or loss.shape != outputs.shape[:2]:
            given = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(
                f"loss_fn must give the loss of every step, a tensor of shape {tuple(outputs.shape[:2])},"
                f" not {given}: use reduction='none' and sum over the features"
            )
        if not loss.isfinite().all():
            raise InputError("the loss is NaN or infinite on these data: check the model's weights and the targets")
        return loss.double().cpu().numpy()

    def gradient(self, lags: int, of_loss: bool, say: Say) -> Decay | None:
        """Return ‖∂ loss_{t+j} / ∂ x_t‖ for j = 0 … `lags` − 1, on predictions with as much past again before that.

        Without `of_loss` a random mixture of the outputs is differentiated instead. Symbols have no derivative: there x
        is the output of the model's first embedding. None: no derivative.
        """
        say("gradients", 0.0)
        longest_first = np.argsort(-np.minimum(self.time + 1, lags), kind="stable")
        chosen = np.random.default_rng(0).permutation(longest_first[: max(GRADIENT_SAMPLES, len(self.time) // 2)])
        chosen = chosen[:GRADIENT_SAMPLES]
        windows = [self._window(p, 2 * lags) for p in chosen]
        lasts = torch.tensor([len(w) - 1 for w in windows], device=self.device)
        targets = torch.stack([self.data[self.sequence[p]][1][self.time[p]] for p in chosen]).to(self.device)
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            x, outputs = self._differentiable(pad_sequence(windows, batch_first=True).to(self.device))
            if x is None or not outputs.requires_grad:
                return None
            outputs = outputs[torch.arange(len(chosen), device=self.device), lasts][:, None]
            loss = self.loss_fn(outputs, targets[:, None]) if of_loss else _mixture(outputs)
            if not loss.requires_grad:
                return None
            (slope,) = torch.autograd.grad(loss.sum(), x, allow_unused=True)
        if slope is None:
            return None
        sizes = slope.detach().reshape(*slope.shape[:2], -1).norm(dim=-1).double().cpu().numpy()
        values = np.full((lags, len(chosen)), np.nan)
        for sample, last in enumerate(lasts.tolist()):
            back = sizes[sample, max(0, last + 1 - lags) : last + 1][::-1]
            values[: len(back), sample] = back
        say("gradients", 1.0)
        return Decay.of(range(lags), values)

    def _differentiable(self, inputs: Tensor) -> tuple[Tensor | None, Tensor]:
        """Run the model; return what to differentiate by beside its outputs."""
        if inputs.is_floating_point():
            inputs.requires_grad_()
            return inputs, self.model(inputs)
        found: list[Tensor] = []

        def detach(layer: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            if found or output.shape[:2] != inputs.shape[:2]:
                return None
            found.append(output.detach().requires_grad_())
            return found[0]

        modules = self.model.modules() if isinstance(self.model, nn.Module) else ()
        hooks = [m.register_forward_hook(detach) for m in modules if isinstance(m, nn.Embedding)]
        try:
            outputs = self.model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return (found[0] if found else None), outputs
