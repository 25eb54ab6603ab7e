"""What longer sequences cost each class of model: seconds and memory of training and scoring, and of a generated step.

    python benchmarks/scaling.py                                     # all models, 128 to 16,384 steps, one thread
    python benchmarks/scaling.py --longest 512 --models lstm,tcn --out trial.json --figure trial.svg

One random sequence (B = 1) of 50 symbols, every model with 200,000 parameters and the settings of its recipe for
characters. In a round each model trains on the sequence and scores it, one after another; medians over rounds, after
one that is thrown away. Peak bytes are how far the resident memory of the process rises above where it was (Linux). A
generated step is timed near the beginning of a stream and near its 1,000th step: what grows is not of constant cost.
"""

import argparse
import ctypes
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from markup import Box, LogAxes, drawing, text
from unrecurrent.batches import Batch
from unrecurrent.comparison import Contender
from unrecurrent.files import write_text
from unrecurrent.models import SequenceModel, build_model, match_parameters, parameter_count
from unrecurrent.recipes import find_recipe
from unrecurrent.records import Record, command_line, make_record, write_records
from unrecurrent.speed import timed, timers_of
from unrecurrent.tasks.task import Example, Metric, Split, Task, shifted
from unrecurrent.training import TrainingConfig, task_interface
from unrecurrent.worker import peak_memory_mib

ROOT = Path(__file__).resolve().parent.parent
RECORDS, FIGURE = ROOT / "results" / "scaling.json", ROOT / "results" / "figures" / "scaling.svg"
MODELS = "lstm,gru,certified-lstm,mingru,tcn,gated-conv,wavenet,transformer:window=null,transformer,window,ngram-lstm"
SHORTEST, LONGEST, ROUNDS, PARAMETERS = 128, 16_384, 5, 200_000
GENERATED, TIMED_STEPS = 1_000, 100
#: what is measured at each length, and its title in the figure
PANELS = {
    "train_seconds": "training, seconds",
    "score_seconds": "scoring, seconds",
    "train_peak_bytes": "training, peak MiB",
    "score_peak_bytes": "scoring, peak MiB",
}


class RandomSymbols(Task):
    """Symbols drawn at random: what is predicted does not matter here, only what it costs."""

    name = "random-symbols"
    metric = Metric("bpc", "lower", "bits a symbol")
    vocabulary = outputs = 50
    stream = True

    def load(self, split: Split) -> Sequence[Example]:
        return [shifted(torch.arange(1_000) % self.outputs)]

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


class Row(NamedTuple):
    """A model to measure: its label in the figure, what a record says of it, and the model itself."""

    label: str
    about: Mapping[str, Any]
    model: SequenceModel


def make_row(label: str, task: Task, parameters: int) -> Row:
    """Return the model of a label such as `transformer:window=null`, at the width that spends the budget."""
    contender = Contender.parse(label)
    settings = {**find_recipe(task, contender.name).settings, **contender.overrides}
    settings = match_parameters(contender.name, task_interface(task), settings, parameters)
    model = build_model(contender.name, task_interface(task), settings)
    about = {
        "model": contender.name,
        "k": settings.get("k"),
        "params": parameter_count(model),
        "hidden_size": settings["hidden_size"],
        "window": settings.get("window"),
        "receptive_field": model.receptive_field,
    }
    return Row(label, about, model)


def measure_length(rows: Sequence[Row], task: Task, steps: int, rounds: int) -> list[dict[str, float]]:
    """Return the numbers of every row on a sequence of so many steps, the timings taken in turns."""
    inputs = torch.randint(50, (1, steps + 1))
    batch = Batch(inputs[:, :-1], inputs[:, 1:], None, fresh=True)
    calls = [timers_of(row.model, task, batch, batch, TrainingConfig())[:2] for row in rows]
    seconds = [[[timed(call) for call in pair] for pair in calls] for _ in range(rounds + 1)][1:]
    found = []
    for i, pair in enumerate(calls):
        medians = [statistics.median(turn[i][kind] for turn in seconds) for kind in range(2)]
        found.append(dict(zip(PANELS, [*medians, *(peak_bytes(call) for call in pair)], strict=True)))
    return found


def peak_bytes(call: Callable[[], None]) -> float:
    """Return how far resident memory rises above where it was, at the least one page."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back first, or the call would be served from it unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from the present
    before = peak_memory_mib()
    call()
    after = peak_memory_mib()
    assert before is not None
    assert after is not None
    return max(4096.0, 2**20 * (after - before))


@torch.no_grad()
def measure_generation(row: Row, steps: int, count: int) -> dict[str, float]:
    """Return the median seconds of `count` generated steps, near the beginning and at the end of so many."""
    model = row.model.eval()
    symbols, cache = torch.randint(50, (steps, 1)), model.init_cache(1)
    seconds = []

    def step() -> None:
        nonlocal cache
        _, cache = model.step(symbols[len(seconds)], cache)

    while len(seconds) < steps:
        seconds.append(timed(step))
    first = min(10, steps - count)  # not the very first, which load code
    early, late = seconds[first : first + count], seconds[-count:]
    return {"early_step_seconds": statistics.median(early), "late_step_seconds": statistics.median(late)}


def records_of(row: Row, steps: int, found: Mapping[str, float]) -> list[Record]:
    """Return one record for each number found on `steps` steps."""
    window = "" if row.about["window"] is None else f", window {row.about['window']}"
    return [
        make_record(
            command=command_line(),
            task="random-symbols",
            variant=f"{steps:,} steps{window}",
            metric=metric,
            split="train" if metric.startswith("train") else "test",
            mean=float(f"{value:.4g}"),
            seeds=1,
            steps=steps,
            **row.about,
        )
        for metric, value in found.items()
    ]


WIDTH, HEIGHT, LEFT, TOP, GAP, LEGEND = 1120, 780, 70, 60, 80, 230
#: Okabe and Ito's colours, told apart with any colour vision; a second round of them is dashed
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Curves = dict[str, list[tuple[float, float]]]


def figure(curves: Mapping[str, Curves]) -> str:
    """Return the drawing: a panel for each metric, a line for each model, both axes logarithmic."""
    width, height = (WIDTH - LEFT - GAP - LEGEND) / 2, (HEIGHT - TOP - 2 * GAP) / 2
    parts = [text(LEFT, 26, "What longer sequences cost, at equal parameters", size=17)]
    for i, metric in enumerate(PANELS):
        left, top = LEFT + (i % 2) * (width + GAP), TOP + (i // 2) * (height + GAP)
        parts += panel(PANELS[metric], Box(left, top, left + width, top + height), curves[metric])
    labels = list(curves[next(iter(PANELS))])
    return drawing(WIDTH, HEIGHT, [*parts, *legend(labels)], "seconds and memory of each model against sequence length")


def panel(title: str, box: Box, curves: Curves) -> list[str]:
    """Return one chart with its grid."""
    xs, ys = ([point[axis] for points in curves.values() for point in points] for axis in (0, 1))
    axes = LogAxes(box, (min(xs), max(max(xs), 2 * min(xs))), (min(ys) / 1.3, 1.3 * max(ys)))
    parts = [text(box.left, box.top - 10, title, size=14)]
    for power in range(-7, 8):
        if min(ys) / 1.3 <= 10.0**power <= 1.3 * max(ys):
            y = axes.y(10.0**power)
            parts.append(f'<path d="M{box.left:.1f},{y:.1f} H{box.right:.1f}" stroke="#ddd"/>')
            parts.append(text(box.left - 8, y + 4, f"{10.0**power:g}", anchor="end"))
    for steps in sorted(set(xs)):
        parts.append(f'<path d="M{axes.x(steps):.1f},{box.bottom:.1f} v6" stroke="black"/>')
        parts.append(text(axes.x(steps), box.bottom + 20, f"{steps:,.0f}", anchor="middle", size=11))
    parts.append(text((box.left + box.right) / 2, box.bottom + 40, "steps", anchor="middle"))
    lines = zip(curves.values(), pens(len(curves)), strict=True)
    return parts + [f'<path d="{axes.path(points)}" fill="none" {pen}/>' for points, pen in lines]


def pens(count: int) -> list[str]:
    """Return how each of so many lines is drawn."""
    dashes = ['stroke-width="2"', 'stroke-width="2" stroke-dasharray="6 4"']
    return [f'stroke="{COLOURS[i % len(COLOURS)]}" {dashes[i // len(COLOURS) % 2]}' for i in range(count)]


def legend(labels: Sequence[str]) -> list[str]:
    parts = []
    for i, (label, pen) in enumerate(zip(labels, pens(len(labels)), strict=True)):
        x, y = WIDTH - LEGEND + 16, TOP + 12 + 24 * i
        parts += [f'<path d="M{x},{y} h26" {pen}/>', text(x + 34, y + 4, label)]
    return parts


def curves_of(rows: Sequence[Row], measured: Mapping[int, Sequence[Mapping[str, float]]]) -> dict[str, Curves]:
    """Return the points of every line of every panel; memory in MiB."""
    labels = [
        f"{r.about['model']}, window {r.about['window']}" if r.about["window"] else r.about["model"] for r in rows
    ]
    return {
        metric: {
            label: [
                (steps, found[i][metric] / (2**20 if "bytes" in metric else 1)) for steps, found in measured.items()
            ]
            for i, label in enumerate(labels)
        }
        for metric in PANELS
    }


def show(rows: Sequence[Row], measured: Mapping[int, Sequence[Mapping[str, float]]], steps: Sequence[Any]) -> None:
    """Print seconds of training and scoring at every length, and of an early and a late generated step."""
    shown = Table("ms: train / score", *(f"{length:,}" for length in measured), "µs a step: early / late")
    for i, row in enumerate(rows):
        cells = [f"{1e3 * f[i]['train_seconds']:.0f} / {1e3 * f[i]['score_seconds']:.0f}" for f in measured.values()]
        shown.add_row(row.label, *cells, " / ".join(f"{1e6 * value:.0f}" for value in steps[i].values()))
    Console(width=180).print(shown)


def main() -> None:
    """Measure, write records and figure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=MODELS, help="names, each optionally with settings")
    parser.add_argument("--longest", type=int, default=LONGEST, help="the longest sequence, in steps")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--generate", type=int, default=GENERATED, help="generated steps")
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument("--out", type=Path, default=RECORDS)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    task = RandomSymbols()
    rows = [make_row(label, task, options.parameters) for label in options.models.split(",")]
    generated = [measure_generation(row, options.generate, min(TIMED_STEPS, options.generate // 3)) for row in rows]
    lengths = [steps for steps in (SHORTEST << i for i in range(20)) if steps <= options.longest]
    measured: dict[int, list[dict[str, float]]] = {}
    for steps in lengths:
        measured[steps] = measure_length(rows, task, steps, options.rounds)
        print(f"{steps:,} steps: done", file=sys.stderr, flush=True)
    records = [
        r
        for steps, found in measured.items()
        for row, f in zip(rows, found, strict=True)
        for r in records_of(row, steps, f)
    ]
    records += [r for row, found in zip(rows, generated, strict=True) for r in records_of(row, options.generate, found)]
    write_records(options.out, records)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.figure, figure(curves_of(rows, measured)))
    show(rows, measured, generated)


if __name__ == "__main__":
    main()
