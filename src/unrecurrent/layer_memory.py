"""What one recurrent layer remembers on real data: forgetting, local rates, exponents, beside what is proved."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unrecurrent.bands import Decay
from unrecurrent.certificate import Certificate, certify
from unrecurrent.lyapunov import TRANSIENT_MOST, exponents, follow, forgetting, local_rates
from unrecurrent.trajectories import CacheTap, CellLayer, Lanes, Recurrence, Segment, Tap, make_lanes, shortened

#: trajectories followed side by side
LANES = 16
#: over how many steps local rates are taken, at how many states
RATE_STEPS = (1, 16)
RATE_STATES = 64
#: most segments, and fewest pairs of start states in all, of the forgetting curve
SEGMENTS, PAIRS = 16, 48


class NotSeen(Exception):
    """Says of a layer why the data show nothing of its memory."""


@dataclass(frozen=True, eq=False, repr=False)
class LayerMemory:
    """Estimates for one recurrent layer along real trajectories, beside its certificate.

    `forgetting`: largest difference of any component of the hidden state, against the lag, for pairs of start states.
    `rates[r]`: ‖J_{t+r} ⋯ J_{t+1}‖₂^(1/r) at sampled states. `lyapunov`: (mean, low, high) a step, largest first.
    """

    name: str
    kind: str
    forgetting: Decay
    rates: dict[int, np.ndarray]
    lyapunov: tuple[tuple[float, float, float], ...]
    steps: int
    """Steps the exponents were averaged over."""
    certificate: Certificate | None

    @property
    def local_rate(self) -> float:
        """The typical (median) growth a step over the most steps measured."""
        return float(np.median(self.rates[max(self.rates)]))

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers; an exponent of −∞ (a direction forgotten at once) is null."""
        finite = [[value if np.isfinite(value) else None for value in row] for row in self.lyapunov]
        return {
            "label": "estimate",
            "name": self.name,
            "kind": self.kind,
            "forgetting": self.forgetting.to_dict(),
            "rates": {str(r): _spread(values) for r, values in self.rates.items()},
            "local_rate": self.local_rate,
            "lyapunov": finite,
            "steps": self.steps,
            "certificate": None if self.certificate is None else self.certificate.to_dict(),
        }

    def __repr__(self) -> str:
        lines = [f"layer {self.name or '(the model)'}: {self.kind}", f"  {_forgetting_in_words(self.forgetting)}"]
        for r, values in self.rates.items():
            s = _spread(values)
            lines.append(
                f"  growth a step over {r} step{'s' * (r > 1)}: typical {s['median']:.4g}"
                f" [{s['low']:.4g}, {s['high']:.4g}], worst {s['worst']:.4g} of {len(values)} states"
            )
        if self.lyapunov:
            shown = ", ".join(f"{mean:.4g} [{low:.4g}, {high:.4g}]" for mean, low, high in self.lyapunov[:3])
            more = f" … {self.lyapunov[-1][0]:.4g}" if len(self.lyapunov) > 3 else ""
            lines.append(f"  {len(self.lyapunov)} Lyapunov exponents over {self.steps:,} steps: {shown}{more}")
        if self.certificate is not None:
            proved = self.certificate
            lines.append(
                f"  proved for inputs like these: rate {proved.rate:.6g}, horizon(0.01) = {proved.horizon(1e-2)}"
                if proved.stable
                else "  proved: nothing (no certificate for inputs like these)"
            )
        return "\n".join(lines)


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(values, [2.5, 50, 97.5])
    return {"median": float(median), "low": float(low), "high": float(high), "worst": float(values.max())}


def _forgetting_in_words(decay: Decay) -> str:
    settled = {level: decay.settled(level) for level in (1e-2, 1e-3)}
    known = [f"{level:g} after {lag:,} steps" for level, lag in settled.items() if lag is not None]
    if len(known) == len(settled):
        return f"forgetting: states that start apart differ by at most {', '.join(known)}"
    worst, median = float(decay.worst[-1]), float(decay.median[-1])
    return (
        f"forgetting: states that start apart still differ by {worst:.2g} (median {median:.2g})"
        f" after {decay.lags[-1]:,} steps"
    )


def measure_layer(
    tap: Tap,
    lags: Sequence[int],
    count: int | Literal["all"],
    steps: int,
    say: Callable[[str, float], None],
) -> LayerMemory:
    """Measure one layer on the segments its tap has kept; `NotSeen` where they show nothing."""
    if not tap.segments:
        raise NotSeen(tap.missed)
    recurrence = tap.recurrence()
    wanted = recurrence.state_size if count == "all" else count
    length = max(len(s.inputs) for s in tap.segments)
    length = min(max(512, length), -(-steps // LANES) + TRANSIENT_MOST)
    lanes = make_lanes(shortened(recurrence, tap.segments, length), LANES, length)
    passage = follow(recurrence, lanes, wanted, 2 * RATE_STATES // lanes.count + 1, lambda f: say("exponents", f))
    rates = _rates(recurrence, lanes, passage.times, passage.states)
    say("local rates", 1.0)
    segments = sorted(shortened(recurrence, tap.segments, lags[-1]), key=lambda s: -len(s.inputs))[:SEGMENTS]
    segments, others = _other_starts(segments, passage.states)
    apart = forgetting(recurrence, segments, others, lags, lambda f: say("forgetting", f))
    spectrum = exponents(passage) if wanted else np.empty((0, 3))
    return LayerMemory(
        name=tap.name,
        kind=tap.kind,
        forgetting=Decay.of(lags, apart),
        rates=rates,
        lyapunov=tuple((float(m), float(low), float(high)) for m, low, high in spectrum),
        steps=(len(passage.growth) - passage.transient) * lanes.count,
        certificate=_certificate(tap),
    )


def _rates(recurrence: Recurrence, lanes: Lanes, times: Sequence[int], states: Tensor) -> dict[int, np.ndarray]:
    """Local rates at visited states from which r steps of the same segment follow."""
    found = {}
    for r in RATE_STEPS:
        usable = [
            (t, i, lane)
            for i, t in enumerate(times)
            for lane in range(lanes.count)
            if int(lanes.remaining[t, lane]) >= r - 1
        ]
        if not usable:
            continue
        picked = [usable[j] for j in np.unique(np.linspace(0, len(usable) - 1, RATE_STATES).astype(int))]
        inputs = torch.stack([lanes.inputs[t : t + r, lane] for t, _, lane in picked], 1)
        starts = torch.stack([states[i, lane] for _, i, lane in picked])
        found[r] = local_rates(recurrence, inputs, starts)
    return found


def _other_starts(segments: Sequence[Segment], visited: Tensor) -> tuple[list[Segment], Tensor]:
    """The segments that have other states to start from, and those: zero (where the model did not) and visited ones."""
    count = -(-PAIRS // len(segments))
    flat = visited.flatten(0, 1)
    flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(1))]
    kept, rows = [], []
    for number, segment in enumerate(segments):
        shifted = flat.roll(-number * count, 0)
        unlike = shifted[(shifted != segment.start).any(1)]
        if not (len(unlike) or segment.start.any()):
            continue
        picked = (unlike if len(unlike) else shifted).repeat(count, 1)[:count].clone()
        if segment.start.any():
            picked[0] = 0.0
        kept.append(segment)
        rows.append(picked)
    if not rows:
        raise NotSeen("was seen in no state but its start: give longer sequences")
    return kept, torch.stack(rows)


def _certificate(tap: Tap) -> Certificate | None:
    """What is proved of the layer for inputs whose drive stays in the range seen here."""
    if isinstance(tap, CacheTap):
        return None
    if isinstance(tap.layer, CellLayer):
        return certify(tap.layer.cell)
    return certify(tap.layer, inputs=torch.cat([s.inputs for s in tap.segments]))
