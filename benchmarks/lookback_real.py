"""How long a window do three real series need? Writes results/lookback.json and a figure a series.

    python benchmarks/lookback_real.py             # about 15 minutes on two cores; needs ETTh1, tanks and F16
    python benchmarks/lookback_real.py tanks       # one of them; the records of the others are kept

Trainings are kept below runs/, so that a second call resumes or reuses them.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from markup import Box, LogAxes, drawing, text
from unrecurrent.files import write_text
from unrecurrent.lookback import Lookback, look_back
from unrecurrent.records import read_records, write_records

ROOT = Path(__file__).resolve().parent.parent
RECORDS, FIGURES = ROOT / "results" / "lookback.json", ROOT / "results" / "figures"
SEEDS = 3
#: what is not as by default: F16 is long and all but free of noise, against which the recipes decay weights strongly
TRAINING = {"ETTh1": {}, "tanks": {}, "F16": {"epochs": 30, "weight_decay": 0.01}}

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 430, 64, 74, 24, 56
#: Okabe and Ito's colours, told apart with any colour vision
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
#: relative losses that may have a line of their own
LINES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.7, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0)


def figure(found: Lookback) -> str:
    """Return the truncation curve and the models that check it as one SVG drawing, all relative to k*, or
    to the longest window considered where there is none."""
    ks = [k for k, *_ in found.profile.curve]
    at = found.window or ks[-1]
    level = next(mean for k, mean, *_ in found.profile.curve if k == at)
    curve = [(k, mean / level) for k, mean, *_ in found.profile.curve]
    checks = {"window": (ORANGE, points(found, "window")), "tcn": (GREEN, points(found, "tcn"))}
    every = [*curve, *(p for _, ps in checks.values() for p in ps)]
    edges = [edge / level for _, _, *ends in found.profile.curve for edge in ends]
    losses, seen = [*(loss for _, loss in every), *edges], [k for k, _ in every]
    box = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    axes = LogAxes(box, (min(seen), max(seen)), (0.97 * min(losses), 1.03 * max(losses)))
    band = [(k, low / level) for k, _, low, _ in found.profile.curve]
    band += [(k, high / level) for k, _, _, high in reversed(found.profile.curve)]
    drawn = [
        f'<path d="{axes.path(band)} Z" fill="{BLUE}" fill-opacity="0.15"/>',
        *(grid_line(axes, loss) for loss in grid(axes)),
        *(tick(axes, 2**p) for p in range(20) if axes.first <= 2**p <= axes.last),
        window_mark(axes, found),
        f'<path d="{axes.path(curve)}" fill="none" stroke="{BLUE}" stroke-width="2.5"/>',
        *(marks(axes, colour, ps) for colour, ps in checks.values()),
        *legend(found.measured.label, {name: colour for name, (colour, _) in checks.items()}),
        text(LEFT, 22, f"{found.task.name}: mean squared error, relative to that at {reference(found)}", size=16),
        text(WIDTH / 2, HEIGHT - 12, "steps seen", anchor="middle"),
    ]
    return drawing(WIDTH, HEIGHT, drawn, found.text)


def reference(found: Lookback) -> str:
    return "k*" if found.window else f"{found.task.longest:,} steps"


def points(found: Lookback, name: str) -> list[tuple[float, float]]:
    """Return the windows of one kind of model and its test losses, relative to the one nearest to the reference."""
    at = found.window or found.task.longest
    models = [m for m in found.models if m.name == name and m.reach]
    models = [m for m in models if m.reach is not None and m.reach <= 2.7 * at]
    level = min(models, key=lambda m: abs(math.log((m.reach or 1) / at))).mean("test")
    return sorted((float(m.reach or 1), m.mean("test") / level) for m in models)


def grid(axes: LogAxes) -> list[float]:
    """Return the round losses on the chart that are far enough apart."""
    kept: list[float] = []
    for loss in (line for line in LINES if axes.low <= math.log(line) <= axes.high):
        if not kept or axes.y(kept[-1]) - axes.y(loss) > 18:
            kept.append(loss)
    return kept


def grid_line(axes: LogAxes, loss: float) -> str:
    y = axes.y(loss)
    line = f'<path d="M{LEFT},{y:.1f} H{WIDTH - RIGHT}" stroke="#ddd"/>'
    return line + text(LEFT - 8, y + 4, f"{loss:g}", anchor="end")


def tick(axes: LogAxes, k: int) -> str:
    x = axes.x(k)
    line = f'<path d="M{x:.1f},{HEIGHT - BOTTOM} v6" stroke="black"/>'
    return line + text(x, HEIGHT - BOTTOM + 20, f"{k:,}", anchor="middle")


def window_mark(axes: LogAxes, found: Lookback) -> str:
    if found.window is None:
        return text(WIDTH - RIGHT, TOP - 8, f"k* is more than {found.task.longest:,}, not checked", anchor="end")
    low, high = found.band[0] or found.window, found.band[1] or axes.last
    shade = f'<rect x="{axes.x(low):.1f}" y="{TOP}" width="{axes.x(high) - axes.x(low):.1f}"'
    shade += f' height="{HEIGHT - TOP - BOTTOM}" fill="#000" fill-opacity="0.06"/>'
    x = axes.x(found.window)
    line = f'<path d="M{x:.1f},{TOP} V{HEIGHT - BOTTOM}" stroke="#444" stroke-dasharray="5 4"/>'
    sign = "≥" if found.window == found.task.longest else "="
    label = f"k* {sign} {found.task.span(found.window)}"
    return shade + line + text(min(x, WIDTH - 155), TOP - 8, label, anchor="middle")


def marks(axes: LogAxes, colour: str, ps: Sequence[tuple[float, float]]) -> str:
    line = f'<path d="{axes.path(ps)}" fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="2 3"/>'
    circle = '<circle cx="{:.1f}" cy="{:.1f}" r="6" fill="{}"/>'
    return line + "".join(circle.format(axes.x(k), axes.y(loss), colour) for k, loss in ps)


def legend(measured: str, colours: dict[str, str]) -> list[str]:
    entries = [(BLUE, f"{measured}, truncated (validation)")]
    entries += [(colour, f"{name}, trained so (test)") for name, colour in colours.items()]
    drawn, x = [], float(LEFT)
    for colour, words in entries:
        drawn += [f'<circle cx="{x + 5:.1f}" cy="40" r="5" fill="{colour}"/>', text(x + 15, 44, words)]
        x += 30 + 6.6 * len(words)
    return drawn


def main(names: Sequence[str]) -> None:
    """Look back on the series named, and write records and figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        command = f"python benchmarks/lookback_real.py {name}"
        folder = ROOT / "runs" / "lookback"
        found = look_back(name, seeds=SEEDS, folder=folder, command=command, **TRAINING[name])
        print(found.table, found.text, sep="\n\n", end="\n\n", flush=True)
        write_text(FIGURES / f"lookback-{name}.svg", figure(found))
        kept = [r for r in read_records(RECORDS) if r["task"] != name] if RECORDS.exists() else []
        write_records(RECORDS, [*kept, *found.records])


if __name__ == "__main__":
    main(sys.argv[1:] or list(TRAINING))
