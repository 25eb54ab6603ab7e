"""How long a window does this series need? Train, measure, recommend, and check the recommendation.

A forecaster that could use a long past is trained and its truncation curve measured (`memory.py`) on the
validation part; k* is the recommended window. Then feed-forward networks that see k*/2, k* and 2 k* steps and nothing
else are trained, and what they lose and gain on the test part says whether the knee is where it was predicted.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from unrecurrent.bands import resampling_weights
from unrecurrent.checkpoint import load_model
from unrecurrent.errors import InputError, checked_whole
from unrecurrent.jobs import job_folder, refuse_diverged, run_jobs
from unrecurrent.knee import Knee, Trained, judge_all
from unrecurrent.memory import MemoryProfile, measure_memory
from unrecurrent.models import Settings, build_model, find_model_class
from unrecurrent.naive import Baseline, baselines
from unrecurrent.recipes import Recipe, find_recipe
from unrecurrent.records import Record, make_record
from unrecurrent.tasks import get_task, task_names
from unrecurrent.tasks.csv_table import read_csv
from unrecurrent.tasks.series import PREFIX, SeriesTask, series_name
from unrecurrent.training import task_interface
from unrecurrent.worker import Job

#: the recommended window may cost this fraction of the loss with the whole past
DELTA = 0.01
#: a forecaster worse than another by this fraction has not learnt all that the past tells
WORSE = 0.05
#: hidden units; small, so that a series trains in seconds
HIDDEN = {"window": 64, "tcn": 32}
HIDDEN_RECURRENT = 64

RULES = (
    "The forecasters trained first can see all {longest} steps that are considered; the one with the smaller mean"
    " validation loss is measured.",
    "The window k* is the smallest k from which on the loss on the validation part, when each prediction sees only the"
    " last k steps, exceeds the loss with the whole past by no more than {delta} and one standard error of that"
    " difference (bootstrap over positions; an estimate). Lengths measured: all up to 8, then four an octave.",
    "The band holds the bootstrap bands (over validation positions) of the smallest k that costs at most {delta},"
    " of every training and of their mean.",
    "Check: `window` (a multi-layer perceptron) and `tcn` are trained from scratch with k*/2, k* and 2 k* and"
    " compared on the test part. The knee is later than predicted where 2 k* gains more than {delta}; where"
    " predicted if not, and k*/2 loses more than {delta}; earlier where k*/2 loses less; each with 97.5%"
    " confidence (Welch's t over the seeds), else (and with one seed) it cannot be told.",
)


@dataclass(frozen=True)
class Change:
    """A relative change of the measured loss and its bootstrap band."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class Lookback:
    """The recommended window with all that speaks for and against it; `.text`, `.records`, `.save_report(path)`.

    `window` is `None` where not even the longest window considered is enough; `band` is the range of k*
    over bootstrap samples and trainings, an upper end of `None` lies beyond the longest window considered.
    """

    task: SeriesTask
    measured: Trained
    profile: MemoryProfile
    window: int | None
    band: tuple[int | None, int | None]
    seed_windows: tuple[int | None, ...]
    lost_at_half: Change | None
    gained_at_double: Change | None
    models: tuple[Trained, ...]
    naive: tuple[Baseline, ...]
    knees: tuple[Knee, ...]
    delta: float
    command: str

    @property
    def forward(self) -> Trained:
        """The feed-forward model of (about) the recommended window that is best on the validation part."""
        wanted = self.window or self.task.longest
        near = [
            m for m in self.models if m.reach and m is not self.measured and wanted / 1.3 <= m.reach <= 1.3 * wanted
        ]
        return min(near, key=lambda m: m.mean("valid"))

    @property
    def text(self) -> str:
        """The answer in a few sentences."""
        return " ".join([self._headline(), *self._reasons()])

    def _headline(self) -> str:
        least = "more than " if self.window is None else "at least " if self.window == self.task.longest else ""
        steps = f"Look back {least}{self.task.span(self.window or self.task.longest)}"
        doubts = " and ".join(self._doubts())
        return f"{steps} by the curve, but {doubts}." if doubts else f"{steps}."

    def _doubts(self) -> Iterator[str]:
        """Yield what speaks against the window, as parts of the first sentence."""
        for place, word in (("later", "longer"), ("earlier", "shorter")):
            names = [knee.name for knee in self.knees if knee.place == place]
            if names:
                yield f"the check with {' and '.join(names)} says {word}"
        forward, naive = self.forward, min(self.naive, key=lambda b: b.test, default=None)
        if naive is not None and naive.test <= forward.mean("test"):
            yield f"{naive.label} is no worse than the {forward.name} that sees {forward.reach} steps"
        if self._sharper is not None:
            yield f"the {self._sharper.label} is better than the {self.measured.label} the curve is of"

    @property
    def _sharper(self) -> Trained | None:
        """A model so much better on the validation part that the one measured has not learnt all the past tells."""
        best = min(self.models, key=lambda m: m.mean("valid"))
        return best if best.mean("valid") < (1 - WORSE) * self.measured.mean("valid") else None

    def _reasons(self) -> Iterator[str]:
        yield self._measurement()
        if self.lost_at_half is not None and self.gained_at_double is not None:
            double = "twice it" if 2 * (self.window or 0) <= self.profile.ks[-1] else "the whole past"
            yield (
                f"By that curve half of it costs {self.lost_at_half} in mean squared error and {double} gains"
                f" {self.gained_at_double}."
            )
        yield from (knee.text for knee in self.knees)
        yield self._beside()
        if self._sharper is not None:
            yield (
                f"The {self._sharper.label} is better than the {self.measured.label} on the validation part by more"
                f" than {_percent(WORSE)}: the model measured has not learnt all that the past tells, and its curve may"
                " mislead."
            )
        best = min((m.mean("test") for m in self.models), default=math.inf)
        better = [b for b in self.naive if b.test <= best]
        if better:
            yield (
                f"No model is better than {better[0].label} ({better[0].test:.4g} on the test part): there is nothing"
                " to learn from a longer past here, or too little data to learn it from."
            )

    def _measurement(self) -> str:
        name, low, high = self.measured.label, *self.band
        if self.window is None:
            return (
                f"The {name} still loses more than {_percent(self.delta)} when it sees only the last"
                f" {self.task.longest} steps: consider longer windows, or keep the recurrence. No window was found, so"
                " that none could be checked."
            )
        if self.window == self.task.longest:
            return (
                f"That is the longest window considered, and every shorter one costs the {name} more than"
                f" {_percent(self.delta)} and one standard error: the estimate is bounded from below only."
            )
        top = f"{high}" if high is not None else f"more than {self.task.longest}"
        return (
            f"Band of that estimate: {low if low is not None else self.task.longest} to {top} steps; the {name}"
            f" loses at most {_percent(self.delta)} and one standard error when it sees nothing older."
        )

    def _beside(self) -> str:
        ours, forward = self.measured, self.forward
        gap = forward.mean("test") / ours.mean("test") - 1
        word = "worse" if gap > 0 else "better"
        return (
            f"The {forward.name} that sees {forward.reach} steps has {forward.mean('test'):.4g} on the test part, the"
            f" {ours.label} that was measured {ours.mean('test'):.4g}: it is {abs(gap):.1%} {word}."
        )

    @property
    def table(self) -> str:
        """The table as text: what each model sees and its mean squared errors."""
        from rich import box
        from rich.console import Console
        from rich.table import Table

        title = f"{self.task.title}: mean squared error, {self.task.metric.unit}"
        table = Table("model", title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for heading in ("sees", "validation", "test", "params"):
            table.add_column(heading, justify="right")
        for model in self.models:
            mark = " (measured)" if model is self.measured else ""
            spread = f" ± {stdev(model.losses('test')):.4f}" if len(model.results) > 1 else ""
            test = f"{model.mean('test'):.4f}{spread}"
            seen = "all" if model.reach is None else f"{model.reach:,}"
            parameters = f"{model.results[0]['parameters']:,}"
            table.add_row(model.name + mark, seen, f"{model.mean('valid'):.4f}", test, parameters)
        for row in self.naive:
            seen = f"season {row.season}" if row.season else "1" if self.task.horizon else "0"
            table.add_row(row.name, seen, f"{row.valid:.4f}", f"{row.test:.4f}", "0")
        console = Console(width=100, color_system=None)
        with console.capture() as captured:
            console.print(table)
        return captured.get().rstrip()

    @property
    def rules(self) -> tuple[str, ...]:
        return tuple(rule.format(longest=self.task.longest, delta=_percent(self.delta)) for rule in RULES)

    @property
    def records(self) -> list[Record]:
        """Flat records: k* first, then every row of the table."""
        return [self._window_record(), *map(self._model_record, self.models), *map(self._naive_record, self.naive)]

    def _window_record(self) -> Record:
        found = [k for k in self.seed_windows if k is not None]
        low, high = self.band
        return make_record(
            command=self.command,
            task=self.task.name,
            model=self.measured.name,
            variant="one-standard-error rule",
            metric="k_star",
            split="valid",
            mean=self.window,
            std=stdev(found) if len(found) == len(self.seed_windows) > 1 else None,
            seeds=len(self.seed_windows),
            k_star=self.profile.k(self.delta),
            k_low=low,
            k_high=high,
            longest=self.task.longest,
            horizon=self.task.horizon,
            seconds_a_step=self.task.seconds,
            lost_at_half=self.lost_at_half.value if self.lost_at_half else None,
            gained_at_double=self.gained_at_double.value if self.gained_at_double else None,
            knees={knee.name: knee.place for knee in self.knees},
            verdict=self.text,
            curve=[[k, *(round(value, 6) for value in values)] for k, *values in self.profile.curve],
        )

    def _model_record(self, model: Trained) -> Record:
        losses = model.losses("test")
        return make_record(
            command=self.command,
            task=self.task.name,
            model=model.name,
            k=model.reach,
            metric=self.task.metric.name,
            split="test",
            mean=mean(losses),
            std=stdev(losses) if len(losses) > 1 else None,
            seeds=len(losses),
            valid_mean=model.mean("valid"),
            hidden_size=model.settings["hidden_size"],
            params=model.results[0]["parameters"],
            epochs=model.results[0]["epochs"],
            minutes=round(mean(r["minutes"] for r in model.results), 3),
            receptive_field=model.reach,
            k_star=self.window if model is self.measured else None,
        )

    def _naive_record(self, baseline: Baseline) -> Record:
        return make_record(
            command=self.command,
            task=self.task.name,
            model=baseline.name,
            variant=f"season {baseline.season}" if baseline.season else None,
            metric=self.task.metric.name,
            split="test",
            mean=baseline.test,
            valid_mean=baseline.valid,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything the report shows, ready for JSON; the keys are those of a comparison, and more."""
        low, high = self.band
        metric, rows = self.task.metric, self.records
        labels = ["k_star", *(m.label for m in self.models), *(b.label for b in self.naive)]
        recurrent = [self.measured.recurrent, *(m.recurrent for m in self.models), *(False for _ in self.naive)]
        table = [{**r, "model": n, "recurrent": c} for r, n, c in zip(rows, labels, recurrent, strict=True)]
        return {
            "task": self.task.name,
            "question": f"How long a window does {self.task.title} need?",
            "step_noun": self.task.step_noun,
            "metric": {"name": metric.name, "direction": metric.direction, "unit": metric.unit},
            "verdict": {"answer": "Look back", "text": self.text, "rules": list(self.rules)},
            "window": {
                "steps": self.window,
                "low": low,
                "high": high,
                "hours": _hours(self.window, self.task.seconds),
                "longest_considered": self.task.longest,
                "delta": self.delta,
                "label": "estimate",
                "measured_on": self.measured.label,
                "by_seed": list(self.seed_windows),
                "lost_at_half": asdict(self.lost_at_half) if self.lost_at_half else None,
                "gained_at_double": asdict(self.gained_at_double) if self.gained_at_double else None,
            },
            "knees": [asdict(knee) for knee in self.knees],
            "feed_forward": self.forward.label,
            "command": self.command,
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": {"description": rows[0]["machine"]},
            "commit": rows[0]["commit"],
            "versions": {"unrecurrent": version("unrecurrent"), "torch": torch.__version__},
            "rows": table[1:],
            "training": {m.label: [_history(r) for r in m.results] for m in self.models},
            "memory": {self.measured.label: self.profile.to_dict(self.delta)},
            "configuration": {m.label: m.settings for m in self.models},
        }

    def save_report(self, path: str | Path) -> None:
        """Write one self-contained HTML page that opens offline."""
        from unrecurrent import report

        report.save(self.to_dict(), Path(path))


def _history(result: Mapping[str, Any]) -> dict[str, Any]:
    return {"seed": result["seed"], "epochs": result["history"]}


def _hours(steps: int | None, seconds: float | None) -> float | None:
    return steps * seconds / 3600 if steps is not None and seconds is not None else None


def series_of(data: str, **options: Any) -> str:
    """Return the name of the task on `data`, a CSV file or a measured series; options are those of `series_name`.

    Raises:
        InputError: a file without a target, or a measured series with options of its own.

    >>> series_of("ETTh1"), series_of("load.csv", target="MW")
    ('ETTh1', 'series:load.csv?target=MW')
    """
    given = {key: value for key, value in options.items() if value not in (None, ())}
    if data in task_names() or data.startswith(PREFIX):
        if given:
            raise InputError(f"{data} brings its own target, horizon and window: leave out {', '.join(given)}")
        return data
    if "target" not in given:
        known = ", ".join(read_csv(Path(data).expanduser()).columns)
        raise InputError(f"name the column to predict with --target: the columns of {data} are {known}")
    return series_name(data, **given)


def look_back(
    task: str,
    *,
    model: str = "lstm",
    seeds: int = 3,
    epochs: int | None = None,
    weight_decay: float | None = None,
    delta: float = DELTA,
    positions: int = 1024,
    data_dir: str | Path | None = None,
    folder: str | Path | None = None,
    command: str | None = None,
    progress: bool = True,
) -> Lookback:
    """Say how long a window a series needs, and check it.

    Args:
        task: `series:FILE.csv?target=…` (see `series_name`), or a measured series (`ETTh1`, `tanks`, `F16`).
        model: the recurrent forecaster; a `tcn` that sees as far as is considered stands beside it.
        seeds: independent trainings of each model.
        epochs: passes over the training part (default: enough for 1,600 optimizer steps).
        weight_decay: that of every model (default: their recipes', strong against the noise of short series).
        delta: the relative loss that a window may cost.
        positions: how many validation positions the truncation curve samples.
        data_dir: where the data sets lie (default: the environment variable `UNRECURRENT_DATA`).
        folder: where the trainings are kept, so that a second call resumes or reuses them.
        command: the command to show in the report.
        progress: show progress bars on stderr.

    Raises:
        InputError: a file, a column or an option that cannot be used; the sentence says which and why.

    >>> look_back("jsb")
    Traceback (most recent call last):
    ...
    unrecurrent.errors.InputError: 'jsb' is no time series: give a CSV file, or one of ETTh1, tanks and F16
    """
    found = get_task(task, data_dir=Path(data_dir) if data_dir else None)
    if not isinstance(found, SeriesTask):
        raise InputError(f"{task!r} is no time series: give a CSV file, or one of ETTh1, tanks and F16")
    seeds = checked_whole("seeds", seeds, 1)
    if not (weight_decay is None or 0 <= weight_decay < math.inf):
        raise InputError(f"weight_decay must be 0 or more, not {weight_decay}")
    if not 0 < delta < 1:
        raise InputError(f"delta must lie between 0 and 1, not {delta}: it is the relative loss a window may cost")
    if not find_model_class(model).recurrent:
        raise InputError(f"{model!r} is not recurrent: name lstm, gru or rnn; tcn is trained beside it anyway")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(folder) if folder else Path(temporary)
        session = _Session(found, str(data_dir) if data_dir else None, root, seeds, epochs, weight_decay, progress)
        wide = session.trained([(model, _settings(model)), ("tcn", _settings("tcn", found.length))])
        measured = min(wide, key=lambda m: m.mean("valid"))
        profiles = session.profiles(measured, positions)
        pooled = _pooled(profiles)
        window = shortest_window(pooled, delta)
        checked = session.trained(_checks(window or found.longest, window is None))
    return Lookback(
        task=found,
        measured=measured,
        profile=pooled,
        window=window,
        band=_joint_band([pooled, *profiles], delta),
        seed_windows=tuple(shortest_window(profile, delta) for profile in profiles),
        lost_at_half=_change(pooled, window, window // 2) if window and window > 1 else None,
        gained_at_double=_change(pooled, 2 * window, window) if window else None,
        models=(*wide, *(m for m in checked if m.label not in {w.label for w in wide})),
        naive=tuple(baselines(found)),
        knees=tuple(judge_all(checked, delta)) if window else (),
        delta=delta,
        command=command or f"unrecurrent.lookback.look_back({task!r}, seeds={seeds})",
    )


class _Session:
    """What all the jobs of one look-back share."""

    def __init__(
        self,
        task: SeriesTask,
        data_dir: str | None,
        root: Path,
        seeds: int,
        epochs: int | None,
        weight_decay: float | None,
        progress: bool,
    ):
        self.task, self.data_dir, self.root = task, data_dir, root
        self.seeds, self.epochs, self.weight_decay, self.progress = seeds, epochs, weight_decay, progress
        self.digest = task.digest()

    def trained(self, wanted: Sequence[tuple[str, Settings]]) -> list[Trained]:
        """Return the models, each trained once a seed."""
        interface = task_interface(self.task)
        models = []
        for name, settings in wanted:
            recipe = find_recipe(self.task, name, self.epochs)
            settings = {**recipe.settings, **settings}
            reach = build_model(name, interface, settings).receptive_field
            models.append((Trained(name, settings, reach, ()), recipe))
        runs = [(m, recipe, seed) for m, recipe in models for seed in range(self.seeds)]
        labels = [f"{m.label}, seed {seed}" for m, _, seed in runs]
        results = run_jobs([self._job(*run) for run in runs], labels, quiet=not self.progress)
        refuse_diverged(results)
        return [replace(m, results=results[i * self.seeds : (i + 1) * self.seeds]) for i, (m, _) in enumerate(models)]

    def _job(self, model: Trained, recipe: Recipe, seed: int) -> Job:
        patience = max(5, int(recipe.training.epochs // 3))
        training = replace(recipe.training, seed=seed, patience=patience)
        if self.weight_decay is not None:
            training = replace(training, weight_decay=self.weight_decay)
        key = [self.task.name, self.digest, model.name, model.settings, training.identity()]
        folder = job_folder(self.root, f"{model.label}-seed{seed}", json.dumps(key, sort_keys=True))
        return Job(self.task.name, self.data_dir, model.name, model.settings, training, str(folder))

    def profiles(self, model: Trained, positions: int) -> list[MemoryProfile]:
        """Return the truncation curve of every training of a model, all on the same positions."""
        data, ks = list(self.task.load("valid")), lengths_measured(self.task.longest)
        measured = [load_model(Path(result["folder"]))[0] for result in model.results]
        return [
            measure_memory(
                trained, data, self.task.loss, ks=ks, positions=positions, layers=False, progress=self.progress
            )
            for trained in measured
        ]


def lengths_measured(longest: int) -> list[int]:
    """Return the truncation lengths: all up to 8, then four an octave, up to `longest`.

    >>> lengths_measured(20)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20]
    """
    ks = set(range(1, 9)) | {quarter << octave for octave in range(20) for quarter in (4, 5, 6, 7)}
    return sorted({k for k in ks if k <= longest} | {longest})


def _settings(name: str, reach: int | None = None) -> Settings:
    """Return the settings of a model of the table; `reach` is how many steps a feed-forward one should see."""
    settings: Settings = {"hidden_size": HIDDEN.get(name, HIDDEN_RECURRENT)}
    if name == "window":
        settings["k"] = reach
    if name == "tcn":
        assert reach is not None
        settings |= tcn_shape(reach)
    return settings


def tcn_shape(reach: int) -> Settings:
    """Return the layers and the kernel of the TCN whose receptive field, 1 + 2 (K−1)(2^layers − 1), is nearest.

    >>> tcn_shape(31), tcn_shape(1)
    ({'layers': 4, 'kernel_size': 2}, {'layers': 1, 'kernel_size': 1})
    """
    shapes = [(1, 1), *((layers, kernel) for layers in range(1, 11) for kernel in range(2, 8))]

    def distance(shape: tuple[int, int]) -> tuple[float, int]:
        layers, kernel = shape
        seen = 1 + 2 * (kernel - 1) * (2**layers - 1)
        return round(abs(math.log(seen / reach)), 2), abs(kernel - 3)

    layers, kernel = min(shapes, key=distance)
    return {"layers": layers, "kernel_size": kernel}


def _checks(window: int, beyond: bool) -> list[tuple[str, Settings]]:
    """Return the feed-forward models that check a window: at half of it, at it and, unless it is too short
    anyway, at twice it."""
    lengths = sorted({max(1, window // 2), window} | (set() if beyond else {2 * window}))
    return [(name, _settings(name, k)) for name in ("window", "tcn") for k in lengths]


# --- what the measurements say ------------------------------------------------------------------------------------


def _pooled(profiles: Sequence[MemoryProfile]) -> MemoryProfile:
    """Return the profile of the mean loss over trainings, position by position."""
    return replace(
        profiles[0],
        losses=np.mean([profile.losses for profile in profiles], axis=0),
        full_losses=np.mean([profile.full_losses for profile in profiles], axis=0),
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"


def shortest_window(profile: MemoryProfile, delta: float) -> int | None:
    """Return the smallest k from which on the loss is not clearly more than `delta` worse than with the whole past.

    "Not clearly": by at most one standard error of L(k)/L(full) − 1 over bootstrap samples of the positions, the same
    sample for both, which is the one-standard-error rule of Breiman et al. 1984. `profile.k` is the same without it,
    and follows the noise of a short validation part to ever longer windows.

    >>> losses = np.array([[2.0, 3.0, 4.0], [1.0, 1.0, 1.03], [1.0, 0.97, 1.05]])
    >>> profile = MemoryProfile((1, 2, 3), losses, np.ones(3))
    >>> shortest_window(profile, 0.005), profile.k(0.005)
    (2, None)
    """
    weights = resampling_weights(len(profile.full_losses))
    samples = (weights @ profile.losses.T) / (weights @ profile.full_losses)[:, None] - 1
    excess = profile.losses.mean(axis=1) / profile.full - 1 - samples.std(axis=0)
    found = None
    for k, clear in sorted(zip(profile.ks, excess.tolist(), strict=True), reverse=True):
        if clear > delta:
            break
        found = k
    return found


def _joint_band(profiles: Sequence[MemoryProfile], delta: float) -> tuple[int | None, int | None]:
    lows, highs = zip(*(profile.k_band(delta) for profile in profiles), strict=True)
    low = min((k for k in lows if k is not None), default=None)
    return low, None if None in highs else max(highs)


def _change(profile: MemoryProfile, reference: int, shorter: int) -> Change:
    """Return how much larger the loss is with the last `shorter` steps than with `reference`, in parts of the loss
    with the larger of the two windows; a length between two measured ones is taken as the shorter of them, one
    beyond all of them as the whole past."""

    def losses(k: int) -> np.ndarray:
        if k > profile.ks[-1]:
            return profile.full_losses
        return profile.losses[max(i for i, measured in enumerate(profile.ks) if measured <= k)]

    base, other, weights = losses(reference), losses(shorter), resampling_weights(len(profile.full_losses))
    low, high = np.percentile((weights @ other) / (weights @ base) - 1, [2.5, 97.5])
    return Change(float(other.mean() / base.mean() - 1), float(low), float(high))
