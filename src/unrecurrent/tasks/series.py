"""Time series of real numbers: forecast a column, or estimate one column from others (`series:FILE.csv`)."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from urllib.parse import parse_qs, urlencode

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from unrecurrent.errors import InputError
from unrecurrent.tasks.csv_table import CsvTable, called_time, read_csv
from unrecurrent.tasks.task import SPLITS, Example, Metric, Split, Task, squared_error

PREFIX = "series:"
#: shares of the rows, in the order of time; the rest is for testing
TRAIN_SHARE, VALID_SHARE = 0.70, 0.15
#: predictions that the validation and the test part must hold at least
FEWEST = 8
#: the longest window considered when none is named, if the training part is at least eight times as long
LONGEST = 256
#: standardised values beyond this cannot be squared in float32
FARTHEST = 1e18
#: validation and test parts longer than this are cut: it bounds the memory of scoring
SCORED_PIECE = 16_384


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one series: inputs `(T, D)` and targets `(T, M)`, float64, in the units of the file."""

    inputs: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Series:
    """One series: its name (empty where there is only one), its rows, split by time, and what scaled its inputs."""

    name: str
    parts: Mapping[Split, Part]
    scale: "Scale | None" = None


@dataclass(frozen=True)
class Scale:
    """What a column is standardised by: mean and standard deviation of the training part."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "Scale":
        with np.errstate(over="ignore", invalid="ignore"):
            scale = cls(values.mean(axis=0), values.std(axis=0))
        if not (np.isfinite(scale.mean).all() and np.isfinite(scale.std).all()):
            raise InputError("a column holds numbers too large to be squared: give it in a larger unit")
        if not scale.std.all():
            raise InputError("a column holds numbers too small to be squared: give it in a smaller unit")
        return scale

    def __call__(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            scaled = (values - self.mean) / self.std
        if np.abs(scaled).max(initial=0) > FARTHEST:
            raise InputError(
                f"a column holds numbers more than {FARTHEST:g} standard deviations of its training part away from its"
                " mean: correct them"
            )
        return scaled


class SeriesTask(Task):
    """Predict real numbers along time series; all columns standardised by the training part, series by series.

    With a horizon `N ≥ 1` the inputs at time t are the target `y_t` and the covariates, and the prediction is the
    change `y_{t+h} − y_t` for `h = 1 … N`: inputs `(T, 1 + covariates)`, targets `(T, N)`. To predict no change is
    then to repeat the last value, at any level of the series. With horizon 0 the target is estimated at the same
    moment from the covariates alone, its own past is not seen (simulation, in the words of system identification).

    The loss of a step is the squared error averaged over what is predicted, in variances of the training part:
    predicting the mean of the training part costs about 1. A training sequence is `length` steps long and
    overlaps the next by half; validation and test parts are read from their own start, without what came before.
    """

    metric = Metric("mse", "lower", "variances of the training part")

    def __init__(self, name: str, horizon: int, features: int, outputs: int, length: int, seconds: float | None):
        self.name, self.horizon = name, horizon
        self.features, self.outputs = features, outputs
        self.length = length
        #: the time between two steps, where it is known and constant
        self.seconds = seconds

    def read(self) -> list[Series]:
        """Return the series in the units of their files."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What is predicted, as it stands in a sentence."""
        return self.name

    @property
    def longest(self) -> int:
        """The longest window considered: half a training sequence, so that twice that window can be checked."""
        return max(1, self.length // 2)

    @cached_property
    def series(self) -> list[Series]:
        """The series, standardised."""
        return [_standardised(series) for series in self.read()]

    @property
    def scales(self) -> dict[str, list[float]] | None:
        """What the inputs are standardised by; of several series, each by its own, the first one's."""
        scale = self.series[0].scale
        assert scale is not None
        return {"mean": scale.mean.tolist(), "std": scale.std.tolist()}

    def load(self, split: Split) -> Sequence[Example]:
        """Return the sequences of a split."""
        examples = [self._example(series.parts[split]) for series in self.series]
        if split == "train":
            return [piece for example in examples for piece in _overlapping(example, self.length)]
        return [piece for example in examples for piece in _consecutive(example, SCORED_PIECE)]

    def _example(self, part: Part) -> Example:
        inputs, targets = part.inputs, part.targets
        if self.horizon:
            future = sliding_window_view(targets[1:, 0], self.horizon)
            inputs, targets = inputs[: len(future)], future - targets[: len(future)]
        return Example(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of every step, `(B, T)`, from outputs and targets `(B, T, outputs)`.

        >>> task = SeriesTask("demo", horizon=2, features=1, outputs=2, length=8, seconds=None)
        >>> task.loss(torch.zeros(1, 1, 2), torch.tensor([[[1.0, 2.0]]]))
        tensor([[2.5000]])
        """
        return squared_error(outputs, targets)

    def digest(self) -> str:
        """Return a fingerprint of the data and of how they are cut, to tell trainings on changed files apart."""
        total = hashlib.sha256(f"{self.horizon} {self.length}".encode())
        for series in self.series:
            for split in SPLITS:
                total.update(np.ascontiguousarray(series.parts[split].inputs).tobytes())
                total.update(np.ascontiguousarray(series.parts[split].targets).tobytes())
        return total.hexdigest()

    def span(self, steps: int) -> str:
        """Return what so many steps are: in steps, and in hours where the time of a step is known.

        >>> SeriesTask("demo", horizon=1, features=1, outputs=1, length=8, seconds=3600.0).span(72)
        '72 steps (72 hours, 3 days)'
        >>> SeriesTask("demo", horizon=1, features=1, outputs=1, length=8, seconds=None).span(1)
        '1 step'
        """
        text = f"{steps:,} step{'s' if steps != 1 else ''}"
        return text if self.seconds is None else f"{text} ({_duration(steps * self.seconds)})"


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds:.3g} seconds" if seconds < 120 else f"{seconds / 60:.3g} minutes, {hours:.2g} hours"
    text = f"{hours:,.3g} hour{'s' if hours != 1 else ''}" if hours < 1000 else f"{hours:,.0f} hours"
    return text if hours < 48 else f"{text}, {hours / 24:.3g} days"


def _standardised(series: Series) -> Series:
    train = series.parts["train"]
    inputs, targets = Scale.of(train.inputs), Scale.of(train.targets)
    return Series(series.name, {s: Part(inputs(p.inputs), targets(p.targets)) for s, p in series.parts.items()}, inputs)


def _overlapping(example: Example, length: int) -> Iterator[Example]:
    """Yield pieces of `length` steps, each half over the one before; the last one ends where the example does."""
    steps = len(example.inputs)
    if steps <= length:
        yield example
        return
    stride = max(1, length // 2)
    for start in [*range(0, steps - length, stride), steps - length]:
        yield Example(example.inputs[start : start + length], example.targets[start : start + length])


def _consecutive(example: Example, length: int) -> Iterator[Example]:
    for inputs, targets in zip(example.inputs.split(length), example.targets.split(length), strict=True):
        yield Example(inputs, targets)


# --- a file of the user's own -------------------------------------------------------------------------------------


def series_name(
    path: str | Path,
    *,
    target: str | None = None,
    horizon: int | None = None,
    covariates: Sequence[str] = (),
    id_column: str | None = None,
    time: str | None = None,
    longest: int | None = None,
) -> str:
    """Return the name of the task on a CSV file; `get_task` turns it back into the task.

    >>> series_name("load.csv", target="MW", horizon=24)
    'series:load.csv?target=MW&horizon=24'
    """
    given = {"target": target, "horizon": horizon, "id": id_column, "time": time, "longest": longest}
    pairs = [(key, str(value)) for key, value in given.items() if value is not None]
    pairs[2:2] = [("covariates", name) for name in covariates]
    return f"{PREFIX}{path}" + (f"?{urlencode(pairs)}" if pairs else "")


class SeriesFile(SeriesTask):
    """The user's own CSV file: its first line names the columns, a row is a step, in the order of time.

    The name is `series:FILE.csv`, optionally with `?target=…&horizon=…&covariates=…&id=…&time=…&longest=…` (see
    `series_name`). Without them the target is the last column of numbers, the horizon 1, and there are no
    covariates; `covariates=all` takes every other column of numbers. Several series in one file are told apart by
    the id column. A column of dates (the one named, else the first that holds dates, or numbers under a name such as
    `timestamp`) must increase within a series; where dates are evenly spaced, spans are stated in hours as well. The
    first 70 % of each series' rows are for training, the next 15 % for validation, the rest for testing.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tide.csv"
    >>> _ = path.write_text("level\\n" + "\\n".join(str(t % 12) for t in range(200)), encoding="utf-8")
    >>> task = SeriesFile(f"series:{path}?horizon=3")
    >>> task.features, task.outputs, [tuple(e.targets.shape) for e in task.load("test")]
    (1, 3, [(27, 3)])
    """

    def __init__(self, name: str) -> None:
        """Read and check the file.

        Raises:
            InputError: an unknown option, or a file that cannot be used; the sentence says why.
        """
        file, options = _parse_name(name)
        self.table = read_csv(Path(file).expanduser())
        self.id_column = options.get("id", [None])[0]
        used = {self.id_column, *options.get("target", ()), *options.get("covariates", ())}
        self.time = options.get("time", [None])[0] or _find_time(self.table, used)
        self.target = options["target"][0] if "target" in options else self._last_number()
        horizon = _whole(options, "horizon", 1, least=0)
        self.covariates = self._named_covariates(options.get("covariates", []))
        if horizon == 0 and not self.covariates:
            raise InputError(
                "with horizon 0 the target is estimated from covariates alone: name them, or choose a horizon of 1"
                " or more"
            )
        rows = self._rows()
        self._check_rows(rows, horizon)
        fewest = min(round(TRAIN_SHARE * len(r)) for r in rows.values())
        longest = _whole(options, "longest", max(1, min(LONGEST, fewest // 8)), least=1)
        if 4 * longest > fewest - horizon:
            raise InputError(
                f"windows of up to {longest} steps need {4 * longest + horizon} training rows and there are {fewest}:"
                f" consider windows of at most {max(1, (fewest - horizon) // 4)}"
            )
        features = len(self.covariates) + (1 if horizon else 0)
        super().__init__(name, horizon, features, max(1, horizon), 2 * longest, self._seconds(rows))
        self._values = self._checked_values(rows)
        self._series_rows = rows

    @property
    def title(self) -> str:
        return f"{self.target} in {Path(self.table.path).name}"

    def read(self) -> list[Series]:
        """Return the series of the file in its own units, split by time."""
        target = self._values[self.target]
        inputs = [*([target] if self.horizon else []), *(self._values[name] for name in self.covariates)]
        table = np.stack(inputs, axis=1)
        return [
            Series(name, split_by_time(Part(table[rows], target[rows, None])))
            for name, rows in self._series_rows.items()
        ]

    def _last_number(self) -> str:
        known = [name for name in self._usable() if self.table.is_numeric(name)]
        if not known:
            raise InputError(f"{self.table.path} has no column of numbers: give a file with a series in it")
        return known[-1]

    def _usable(self) -> list[str]:
        return [name for name in self.table.columns if name not in (self.id_column, self.time)]

    def _named_covariates(self, named: Sequence[str]) -> list[str]:
        self.table.column(self.target)
        if list(named) == ["all"] and "all" not in self.table.columns:
            return [n for n in self._usable() if n != self.target and self.table.is_numeric(n)]
        for name in named:
            self.table.column(name)
            if name == self.target:
                raise InputError(f"{name!r} is the target: its own past is used anyway, leave it out of the covariates")
        return list(dict.fromkeys(named))

    def _rows(self) -> dict[str, np.ndarray]:
        """Return the row numbers of each series, in the order of the file."""
        if self.id_column is None:
            return {"": np.arange(len(self.table.lines))}
        names = np.array(self.table.column(self.id_column))
        unnamed = np.flatnonzero(names == "")
        if len(unnamed):
            line = self.table.lines[unnamed[0]]
            raise InputError(
                f"line {line} of {self.table.path} has no {self.id_column!r} to tell its series by: fill it in"
            )
        return {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}

    def _check_rows(self, rows: Mapping[str, np.ndarray], horizon: int) -> None:
        for name, own in rows.items():
            whose = f"the series {name!r} in {self.table.path}" if name else self.table.path
            if len(own) <= horizon:
                raise InputError(f"{whose} has {len(own)} rows, none of them {horizon} steps ahead: lower the horizon")
            needed = _fewest_rows(horizon + FEWEST)
            if len(own) < needed:
                advice = "a smaller horizon or a longer series" if horizon > 1 else "a longer series"
                raise InputError(
                    f"{whose} has {len(own)} rows and a horizon of {horizon} needs at least {needed}, so that training,"
                    f" validation and test part are all longer than it: give {advice}"
                )

    def _checked_values(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {name: self.table.numbers(name) for name in (self.target, *self.covariates)}
        for column, numbers in values.items():
            for name, own in rows.items():
                _check_varies(numbers[own], column, name, is_target=column == self.target)
        return values

    def _seconds(self, rows: Mapping[str, np.ndarray]) -> float | None:
        """Return the time between two rows, `None` where there are no dates or they are not evenly spaced."""
        if self.time is None:
            return None
        readings = self.table.times(self.time)
        faults = [_first_disorder(times, rows) for times in readings]
        if None not in faults:
            before, after = max(fault for fault in faults if fault)
            raise InputError(
                f"the dates in {self.time!r} are out of order: line {self.table.lines[after]} of"
                f" {self.table.path} is not later than line {self.table.lines[before]}; sort the rows by time"
                + ("" if self.id_column else ", or name the column that tells several series apart")
            )
        if self.table.is_numeric(self.time):
            return None
        times = readings[faults.index(None)]
        steps = {times[after] - times[before] for own in rows.values() for before, after in pairwise(own.tolist())}
        return steps.pop() if len(steps) == 1 else None


def _first_disorder(times: Sequence[float], rows: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Return the first two neighbouring rows of a series whose times do not increase."""
    pairs = (pair for own in rows.values() for pair in pairwise(own.tolist()))
    return next(((before, after) for before, after in pairs if times[after] <= times[before]), None)


def _parse_name(name: str) -> tuple[str, dict[str, list[str]]]:
    rest = name.removeprefix(PREFIX)
    if not rest:
        raise InputError("the task series: needs a file: write series:FILE.csv")
    file, mark, query = rest.rpartition("?")
    if not mark or Path(rest).expanduser().is_file():
        return rest, {}
    options = parse_qs(query, keep_blank_values=True)
    known = ("target", "horizon", "covariates", "id", "time", "longest")
    for key in options:
        if key not in known:
            raise InputError(f"unknown option {key!r} in {name!r}: known are {', '.join(known)}")
    return file, options


def _whole(options: Mapping[str, Sequence[str]], key: str, default: int, least: int) -> int:
    text = options[key][-1] if key in options else str(default)
    if not text.isdecimal() or int(text) < least:
        raise InputError(f"the {key} must be a whole number of at least {least}, not {text!r}")
    return int(text)


def _find_time(table: CsvTable, used: set[str | None]) -> str | None:
    """Return the first column that says when its row was measured, of those not used for something else.

    One that is only called so is taken as well, to be refused: rows out of order would go unnoticed.
    """
    free = [name for name in table.columns if name not in used]
    return next((name for check in (table.is_time, called_time) for name in free if check(name)), None)


def _check_varies(values: np.ndarray, column: str, series: str, *, is_target: bool) -> None:
    own = f" of the series {series!r}" if series else ""
    remedy = "there is nothing to predict; name another target" if is_target else "leave it out"
    if values.min() == values.max():
        raise InputError(f"the column {column!r}{own} is constant: {remedy}")
    train = values[: round(TRAIN_SHARE * len(values))]
    if train.min() == train.max():
        raise InputError(f"the column {column!r}{own} does not change in the training part (the first 70 %): {remedy}")


def _bounds(rows: int) -> tuple[int, int]:
    return round(TRAIN_SHARE * rows), round((TRAIN_SHARE + VALID_SHARE) * rows)


def _shortest_part(rows: int) -> int:
    first, second = _bounds(rows)
    return min(first, second - first, rows - second)


def _fewest_rows(steps: int) -> int:
    """Return how many rows a series needs so that each part has at least so many.

    >>> [(_fewest_rows(n), _shortest_part(_fewest_rows(n)), _shortest_part(_fewest_rows(n) - 1)) for n in (8, 10**6)]
    [(52, 8, 7), (6666666, 1000000, 999999)]
    """
    near = int(steps / VALID_SHARE)  # rounding moves each part by less than a row, which is seven of the whole
    return next(n for n in range(max(1, near - 14), near + 15) if _shortest_part(n) >= steps)


def split_by_time(part: Part, bounds: tuple[int, int] | None = None) -> dict[Split, Part]:
    """Return the rows before the first bound, those up to the second, and the rest (default: 70, 15, 15 %).

    >>> rows = np.arange(20.0)[:, None]
    >>> [len(p.inputs) for p in split_by_time(Part(rows, rows)).values()]
    [14, 3, 3]
    """
    first, second = bounds or _bounds(len(part.inputs))
    cuts = {"train": slice(0, first), "valid": slice(first, second), "test": slice(second, None)}
    return {split: Part(part.inputs[cuts[split]], part.targets[cuts[split]]) for split in SPLITS}
