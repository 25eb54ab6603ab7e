"""Compare models on a task at equal budget: table, memory curves, verdict, report."""

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from unrecurrent.certificate import Certificate
from unrecurrent.checkpoint import load_model
from unrecurrent.errors import InputError, as_number, checked_whole
from unrecurrent.files import make_folder, write_text
from unrecurrent.jobs import job_folder, refuse_diverged, run_jobs
from unrecurrent.memory import MemoryProfile
from unrecurrent.models import SequenceModel, Settings, build_model, find_model_class, match_parameters
from unrecurrent.models.recurrent import RecurrentModel
from unrecurrent.recipes import Recipe, default_models, default_parameters, find_recipe, twin
from unrecurrent.records import Record, commit, make_record
from unrecurrent.search import draw_recipes
from unrecurrent.speed import Speed, epochs_within, measure_speed
from unrecurrent.task_memory import measure_on_task, memory_data
from unrecurrent.tasks import SPLITS, Example, Metric, Task, get_task
from unrecurrent.training import task_interface
from unrecurrent.verdict import Candidate, Verdict, decide
from unrecurrent.worker import Job

#: parameter counts of two models differ by at most this, if each is within `NEAR` of the count asked for
TOLERANCE = 0.05
NEAR = TOLERANCE / (2 + TOLERANCE)
#: k* is the smallest context whose loss is within this fraction of the full one
DELTA = 0.01
#: the certified horizon is about changes of the hidden state of this size
HORIZON_EPS = 1e-2


@dataclass(frozen=True)
class Contender:
    """A model in a comparison: its name and the settings that differ from its recipe.

    >>> Contender.parse("window:k=4")
    Contender(name='window', overrides={'k': 4})
    >>> Contender.parse("window:k=4").label
    'window:k=4'
    """

    name: str
    overrides: Settings

    @classmethod
    def parse(cls, text: str) -> "Contender":
        name, *pairs = text.split(":")
        find_model_class(name)
        overrides: Settings = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(f"cannot read {pair!r} in {text!r}: write a setting as NAME:KEY=VALUE")
            try:
                overrides[key] = json.loads(value)
            except ValueError as error:
                raise InputError(f"the setting {key!r} in {text!r} must be a number, not {value!r}") from error
        return cls(name, overrides)

    @property
    def label(self) -> str:
        return ":".join([self.name, *(f"{key}={value}" for key, value in self.overrides.items())])

    @property
    def recurrent(self) -> bool:
        return find_model_class(self.name).recurrent


@dataclass(frozen=True)
class Entry:
    """One compared model with all that was measured of it."""

    contender: Contender
    recipe: Recipe
    results: Sequence[dict[str, Any]]
    receptive_field: int | None
    speed: Speed
    memory: MemoryProfile | None
    proved: Mapping[str, float | int | None]


@dataclass(frozen=True)
class Comparison:
    """Models compared on one task at equal budget; `.table`, `.verdict`, `.records`, `.save_report(path)`."""

    task: Task
    entries: tuple[Entry, ...]
    verdict: Verdict
    command: str
    budget: Mapping[str, Any]

    @property
    def table(self) -> str:
        """The table as text, the best of each column marked."""
        from rich.console import Console

        from unrecurrent.report import terminal_table

        console = Console(width=120, color_system=None)
        with console.capture() as captured:
            console.print(terminal_table(self.to_dict()))
        return captured.get()

    @property
    def records(self) -> list[Record]:
        """One flat record a model, with the keys of every results file."""
        return [_record(entry, self.task, self.command) for entry in self.entries]

    def to_dict(self) -> dict[str, Any]:
        """Return everything the report shows, ready for JSON."""
        metric, entries = self.task.metric, self.entries
        rows = [
            {
                **record,
                "model": entry.contender.label,
                "recurrent": entry.contender.recurrent,
            }
            for entry, record in zip(entries, self.records, strict=True)
        ]
        return {
            "task": self.task.name,
            "step_noun": self.task.step_noun,
            "metric": {"name": metric.name, "direction": metric.direction, "unit": metric.unit},
            "verdict": self.verdict.to_dict(),
            "command": self.command,
            "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": {"description": rows[0]["machine"] if rows else ""},
            "commit": rows[0]["commit"] if rows else "",
            "versions": {"unrecurrent": version("unrecurrent"), "torch": torch.__version__},
            "rows": rows,
            "training": {e.contender.label: [_training(r, metric) for r in e.results] for e in entries},
            "memory": {e.contender.label: e.memory.to_dict(DELTA) for e in entries if e.memory is not None},
            "configuration": {e.contender.label: _configuration(e) for e in entries},
            "budget": dict(self.budget),
        }

    def save_report(self, path: str | Path) -> None:
        """Write one self-contained HTML page that opens offline."""
        from unrecurrent import report

        report.save(self.to_dict(), Path(path))


def compare(
    task: str,
    models: str | Iterable[str] | None = None,
    *,
    seeds: int = 2,
    parameters: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    trials: int = 0,
    data_dir: str | Path | None = None,
    folder: str | Path | None = None,
    positions: int = 2048,
    command: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Train models on a task at equal budget and say whether a recurrent one is needed.

    Equal budget: every model gets the width whose parameter count comes nearest to `parameters` (within 2.4 %, so that
    any two models are within 5 % of each other), the same number of epochs over the same data and, with `trials`, the
    same drawn settings to choose from on validation data (a stable model takes over those of its unconstrained twin).
    Each is then trained from `seeds` seeds; test metric, speeds, peak memory and the truncation curve are measured;
    the verdict follows from them by the rules in `verdict.RULES`.

    Args:
        task: the name of a task (`unrecurrent data list`), or `text:FILE`.
        models: names, each optionally with settings: `["lstm", "tcn:layers=3", "window:k=4"]`; or one of them.
        seeds: independent trainings of each model.
        parameters: trainable parameters of every model.
        epochs: passes over the training data, 0.5 for half of one (default: those of the recipe).
        minutes: instead of `epochs`, how long one training of the slowest model may take: all models then make as many
            passes as that one does in this time, on one thread of this machine.
        trials: draws of the settings to tune over; 0 takes the recorded recipe.
        data_dir: where the data sets lie (default: the environment variable `UNRECURRENT_DATA`).
        folder: where the trainings are kept, so that a second call resumes or reuses them.
        positions: how many test positions the truncation curve samples.
        command: the command to show in the report.
        progress: show a progress bar on stderr.

    Raises:
        InputError: an unknown task or model, missing data, a number that cannot be, or a budget no width can meet.

    >>> compare("jsb", models=["lstn"])
    Traceback (most recent call last):
    ...
    unrecurrent.errors.InputError: unknown model 'lstn': did you mean 'lstm'? ...
    """
    commit()  # that of the records, noted as the run begins
    seeds, trials = checked_whole("seeds", seeds, 1), checked_whole("trials", trials, 0)
    positions = checked_whole("positions", positions, 1)
    if parameters is not None:
        parameters = checked_whole("parameters", parameters, 1)
    if minutes is not None:
        given, minutes = minutes, as_number(minutes)
        if epochs is not None or minutes is None or minutes <= 0:
            raise InputError(f"give either epochs or a positive number of minutes, not {epochs} and {given}")
    contenders = _contenders(models)
    found = get_task(task, data_dir=Path(data_dir) if data_dir else None)
    contenders = contenders or [Contender.parse(text) for text in default_models(found)]
    if len({c.label for c in contenders}) < len(contenders):
        raise InputError("a model is named twice: name each once, or give it different settings")
    with tempfile.TemporaryDirectory() as temporary:
        session = _Session(
            found,
            str(data_dir) if data_dir else None,
            Path(folder) if folder else Path(temporary),
            default_parameters(found) if parameters is None else parameters,
            epochs,
            progress,
        )
        if minutes is not None:
            session.epochs = session.affordable(contenders, minutes)
        recipes = session.tuned(contenders, trials) if trials else session.recorded(contenders)
        entries = session.measured(contenders, recipes, session.trained(contenders, recipes, seeds), positions)
    metric = {"direction": found.metric.direction, "unit": found.metric.unit}
    verdict = decide([_candidate(e, found.metric) for e in entries], metric, found.step_noun, found.chance)
    shown = command or _python_call(
        task, contenders, seeds=seeds, parameters=parameters, epochs=epochs, minutes=minutes, trials=trials or None
    )
    return Comparison(found, tuple(entries), verdict, shown, _budget(session, recipes, entries, seeds, trials))


def _contenders(models: str | Iterable[str] | None) -> list[Contender]:
    """Return the models that were named; a text is one name, not as many as it has letters."""
    if models is None:
        return []
    names = list(models) if isinstance(models, Iterable) and not isinstance(models, str) else [models]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"models must be names, as in ['lstm', 'tcn:layers=3'], not {models!r}")
    return [Contender.parse(name) for name in names]


class _Session:
    """What all the jobs of one comparison share."""

    def __init__(
        self, task: Task, data_dir: str | None, root: Path, parameters: int, epochs: float | None, progress: bool
    ):
        self.task, self.data_dir, self.root = task, data_dir, root
        self.parameters, self.epochs, self.progress = parameters, epochs, progress
        self.digest = task.digest()

    def recorded(self, contenders: Sequence[Contender]) -> list[Recipe]:
        return [self.fitted(c, find_recipe(self.task, c.name, self.epochs)) for c in contenders]

    def fitted(self, contender: Contender, recipe: Recipe) -> Recipe:
        """Return the recipe with the contender's own settings, at the width the budget allows."""
        settings = {**recipe.settings, **contender.overrides}
        if "hidden_size" in contender.overrides:
            raise InputError("hidden_size follows from the budget: give --parameters instead")
        interface = task_interface(self.task)
        matched = match_parameters(contender.name, interface, settings, self.parameters, NEAR)
        return replace(recipe, settings=matched)

    def affordable(self, contenders: Sequence[Contender], minutes: float) -> float:
        """Return how many epochs the slowest model makes in so many minutes; measured once and kept, to be resumed."""
        pairs = list(zip(contenders, self.recorded(contenders), strict=True))
        asked = json.dumps([self.digest, minutes, [[c.name, r.settings] for c, r in pairs]])
        kept = job_folder(self.root, "budget", asked).with_suffix(".json")
        if not kept.exists():
            models = {c.label: build_model(c.name, task_interface(self.task), r.settings) for c, r in pairs}
            make_folder(self.root)
            found = epochs_within(minutes, models, self.task, pairs[0][1].training)
            write_text(kept, json.dumps({"minutes": minutes, "epochs": found}))
        epochs: float = json.loads(kept.read_text(encoding="utf-8"))["epochs"]
        return epochs

    def tuned(self, contenders: Sequence[Contender], trials: int) -> list[Recipe]:
        """Return, for each contender, the best of the same draws; stable models take over their twin's."""
        tuned = [Contender(twin(c.name), c.overrides) for c in contenders]
        distinct = list({c.label: c for c in tuned}.values())
        drawn = {
            c.label: [
                self.fitted(c, recipe)
                for recipe in draw_recipes(find_recipe(self.task, c.name, self.epochs), trials, c.overrides)
            ]
            for c in distinct
        }
        jobs = [(c, r, 0) for c in distinct for r in drawn[c.label]]
        results = iter(self._run(jobs, note="tuning "))
        best: dict[str, Recipe] = {}
        for c in distinct:
            scored = [(self._criterion(next(results)), i) for i in range(trials)]
            best[c.label] = drawn[c.label][min(scored)[1]]
        return [self.fitted(c, best[t.label]) for c, t in zip(contenders, tuned, strict=True)]

    def _criterion(self, result: Mapping[str, Any]) -> float:
        return math.inf if "diverged" in result else self.task.criterion(result)

    def trained(
        self, contenders: Sequence[Contender], recipes: Sequence[Recipe], seeds: int
    ) -> list[list[dict[str, Any]]]:
        """Return the results of every contender, one a seed."""
        pairs = list(zip(contenders, recipes, strict=True))
        results = self._run([(c, r, seed) for c, r in pairs for seed in range(seeds)])
        refuse_diverged(results)
        return [results[i * seeds : (i + 1) * seeds] for i in range(len(pairs))]

    def _run(self, runs: Sequence[tuple[Contender, Recipe, int]], note: str = "") -> list[dict[str, Any]]:
        jobs = [self._job(contender, recipe, seed) for contender, recipe, seed in runs]
        labels = [f"{note}{contender.label}, seed {seed}" for contender, _, seed in runs]
        return run_jobs(jobs, labels, quiet=not self.progress)

    def _job(self, contender: Contender, recipe: Recipe, seed: int) -> Job:
        training = replace(recipe.training, seed=seed, patience=None)
        settings = recipe.settings
        fingerprint = json.dumps([self.digest, contender.name, settings, training.identity()], sort_keys=True)
        folder = job_folder(self.root, f"{contender.label}-seed{seed}", fingerprint)
        return Job(self.task.name, self.data_dir, contender.name, settings, training, str(folder))

    def measured(
        self,
        contenders: Sequence[Contender],
        recipes: Sequence[Recipe],
        results: Sequence[Sequence[dict[str, Any]]],
        positions: int,
    ) -> list[Entry]:
        """Return the contenders with speeds and truncation curves, measured on the first seed's model."""
        labels = [c.label for c in contenders]
        trained = [load_model(Path(r[0]["folder"]))[0] for r in results]
        data = memory_data(self.task)
        profiles = [self._profile(model, data, positions) for model in trained]
        proofs = [proved(model, self.task) for model in trained]
        speeds = measure_speed(dict(zip(labels, trained, strict=True)), self.task, recipes[0].training)
        return [
            Entry(c, recipe, result, model.receptive_field, speeds[c.label], profile, proof)
            for c, recipe, result, model, profile, proof in zip(
                contenders, recipes, results, trained, profiles, proofs, strict=True
            )
        ]

    def _profile(self, model: SequenceModel, data: Sequence[Example], positions: int) -> MemoryProfile | None:
        """Return the truncation curve and, of a recurrent model, the local rate; its exponents would take longer.

        Of a task in two parts there is none: its last k symbols would leave out what is to be answered.
        """
        if self.task.separator is not None:
            return None
        return measure_on_task(model, self.task, data, positions=positions, delta=DELTA, exponents=1, steps=512)


def certificate_on_data(model: RecurrentModel, task: Task, method: str = "best") -> Certificate:
    """Return what is proved of a recurrent model for inputs in the range of the task's data."""
    if model.embedding is not None:
        return model.certificate(method=method)
    return model.certificate(inputs=[x for split in SPLITS for x, _ in task.load(split)], method=method)


def _scores(entry: Entry, split: str, metric: Metric) -> list[float]:
    return [metric.read(result, split) for result in entry.results]


def _candidate(entry: Entry, metric: Metric) -> Candidate:
    return Candidate(
        entry.contender.label,
        entry.contender.recurrent,
        _scores(entry, "valid", metric),
        _scores(entry, "test", metric),
        entry.receptive_field,
        _k_star(entry),
        entry.speed.score,
        measured=entry.memory is not None,
    )


def _record(entry: Entry, task: Task, command: str) -> Record:
    scores = _scores(entry, "test", task.metric)
    overrides = {key: value for key, value in entry.contender.overrides.items() if key != "k"}
    return make_record(
        command=command,
        task=task.name,
        model=entry.contender.name,
        variant=", ".join(f"{key} {value}" for key, value in overrides.items()) or None,
        k=entry.recipe.settings.get("k"),
        metric=task.metric.name,
        split="test",
        mean=mean(scores),
        std=stdev(scores) if len(scores) > 1 else None,
        seeds=len(scores),
        hidden_size=entry.recipe.settings["hidden_size"],
        params=entry.results[0]["parameters"],
        epochs=entry.results[0]["epochs"],
        minutes=round(mean(r["minutes"] for r in entry.results), 3),
        train_tokens_per_s=round(entry.speed.train, 1),
        score_tokens_per_s=round(entry.speed.score, 1),
        generate_steps_per_s=round(entry.speed.generate, 1),
        peak_memory_mib=_peak(entry.results),
        receptive_field=entry.receptive_field,
        k_star=_k_star(entry),
        **entry.proved,
        local_rate=max((layer.local_rate for layer in entry.memory.layers), default=None) if entry.memory else None,
    )


def _k_star(entry: Entry) -> int | None:
    return entry.memory.k(DELTA) if entry.memory is not None else None


def _peak(results: Sequence[Mapping[str, Any]]) -> float | None:
    peaks = [result["peak_memory_mib"] for result in results]
    return None if None in peaks else round(max(peaks), 1)


def proved(model: SequenceModel, task: Task) -> dict[str, float | int | None]:
    """Return what a record says of what is proved of a model for the task's data: `None` where nothing is.

    The horizon is one of the model's inputs: where a convolution stands before the layers, it is longer than theirs.
    """
    nothing: dict[str, float | int | None] = {"certified_rate": None, "certified_horizon": None}
    if not isinstance(model, RecurrentModel):
        return nothing
    certificate = certificate_on_data(model, task)
    if not certificate.stable:
        return nothing
    horizon = certificate.horizon(HORIZON_EPS)
    return {"certified_rate": certificate.rate, "certified_horizon": None if horizon is None else horizon + model.reach}


def _training(result: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    epochs = [{**e, **{name: metric.of(e[name]) for name in ("train_loss", "valid_loss")}} for e in result["history"]]
    return {"seed": result["seed"], "epochs": epochs}


def _configuration(entry: Entry) -> dict[str, Any]:
    training = {k: v for k, v in asdict(entry.recipe.training).items() if k not in ("seed", "patience")}
    return {**entry.recipe.settings, **training}


def _budget(
    session: _Session, recipes: Sequence[Recipe], entries: Sequence[Entry], seeds: int, trials: int
) -> dict[str, Any]:
    """Return the budget, after checking that every model was indeed given the same."""
    counts = [entry.results[0]["parameters"] for entry in entries]
    if max(counts) > (1 + TOLERANCE) * min(counts):
        raise InputError(
            f"parameter counts differ by more than {TOLERANCE:.0%} ({min(counts):,} to {max(counts):,}):"
            " choose a larger budget"
        )
    # One count a seed: part of a pass may hold other sequences, and so be longer or shorter, for another seed.
    tokens = {tuple(result["tokens"] for result in entry.results) for entry in entries}
    epochs = {recipe.training.epochs for recipe in recipes}
    if len(tokens) != 1 or len(epochs) != 1:
        raise RuntimeError(f"budgets differ: {tokens} tokens read, {epochs} epochs")
    return {
        "parameters": session.parameters,
        "epochs": epochs.pop(),
        "tokens read": max(tokens.pop()),
        "seeds": seeds,
        "tuning trials": trials,
    }


def _python_call(task: str, contenders: Sequence[Contender], **given: float | None) -> str:
    options = "".join(f", {key}={value}" for key, value in given.items() if value is not None)
    return f"ur.compare({task!r}, models={[c.label for c in contenders]}{options})"
