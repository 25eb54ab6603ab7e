"""What is proved about trained models, and what the data show: the paper's conditions, their sum test, ours.

    unrecurrent compare jsb --models rnn,stable-rnn,... --seeds 3 --trials 6 --runs runs
    python benchmarks/certificates.py --runs runs --task jsb

Reads the recurrent models that `compare` trained and writes results/certificates.json, for inputs in the range of
the task's data. `variant` "conditions" asks whether the four conditions of Miller and Hardt (for the RNN: the spectral
norm) hold, `mean` is the share of the seeds for which they do; "sum test" is the rate their sum test gives (RNN: the
norm), "certify" the rate and horizon that `certify` proves, "local" the median growth of a small difference of states
over 16 steps along the test data, as a factor a step: an estimate.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from unrecurrent.checkpoint import load_model
from unrecurrent.comparison import certificate_on_data
from unrecurrent.memory import measure_memory
from unrecurrent.models import find_model_class
from unrecurrent.models.recurrent import RecurrentModel
from unrecurrent.records import Record, command_line, make_record, write_records
from unrecurrent.tasks import Task, get_task
from unrecurrent.worker import RESULT

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "certificates.json"
EPS = 1e-2


def chosen_runs(runs: Path, task: Task) -> dict[str, list[Path]]:
    """Return the folders of the comparison in `runs`, by model: those trained from every seed it used.

    Trials of the tuning were trained from seed 0 alone, so the settings of the other seeds say which were chosen. Of
    comparisons with as many seeds it is the longest.
    """
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(runs.glob(f"*/{RESULT}")):
        job = json.loads((path.parent / "job.json").read_text(encoding="utf-8"))
        if job["task"] == task.name:
            chosen = json.dumps([job["settings"], {**job["training"], "seed": None}])
            found.setdefault(job["model"], {}).setdefault(chosen, []).append(path.parent)

    def seeds_and_epochs(group: tuple[str, list[Path]]) -> tuple[int, float]:
        return len(group[1]), json.loads(group[0])[1]["epochs"]

    return {name: max(groups.items(), key=seeds_and_epochs)[1] for name, groups in found.items()}


def trained(runs: Path, task: Task) -> dict[str, list[RecurrentModel]]:
    """Return the recurrent models of the comparison in `runs`, by name."""
    found: dict[str, list[RecurrentModel]] = {}
    for name, folders in chosen_runs(runs, task).items():
        for folder in folders if find_model_class(name).recurrent else []:
            model, _ = load_model(folder)
            assert isinstance(model, RecurrentModel)
            found.setdefault(name, []).append(model)
    return found


def rows(name: str, models: list[RecurrentModel], task: Task) -> list[Record]:
    """Return the records of one model: conditions, sum test, certify, local."""

    def record(variant: str, values: list[float], horizon: int | None = None, rate: float | None = None) -> Record:
        return make_record(
            command=command_line(),
            task=task.name,
            model=name,
            variant=variant,
            metric="rate" if variant != "conditions" else "share",
            split="test",
            mean=mean(values),
            std=None,
            seeds=len(models),
            hidden_size=models[0].hidden_size,
            certified_rate=rate,
            certified_horizon=horizon,
        )

    made = []
    if name.endswith(("rnn", "lstm")) and name != "certified-lstm":
        theirs = [certificate_on_data(model, task, method="miller-hardt") for model in models]
        made.append(record("conditions", [float(not c.reasons) for c in theirs]))
        made.append(record("sum test", [c.rate for c in theirs]))
    ours = [certificate_on_data(model, task) for model in models]
    proved = all(c.stable for c in ours)
    rates = [c.rate for c in ours if c.rate is not None]
    horizon = max(c.horizon(EPS) for c in ours) if proved else None
    if rates:
        made.append(record("certify", rates, horizon, max(rates) if proved else None))
    data = list(task.load("test"))
    profiles = [measure_memory(m, data, task.loss, ks=(1,), positions=256, exponents=1, steps=512) for m in models]
    made.append(record("local", [max(layer.local_rate for layer in p.layers) for p in profiles]))
    return made


def main() -> None:
    """Certify every trained model and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--task", default="jsb")
    options = parser.parse_args()
    task = get_task(options.task)
    records = [r for name, models in trained(options.runs, task).items() for r in rows(name, models, task)]
    write_records(OUTPUT, records)
    table = Table("model", "what", "rate (or share)", "proved rate", "proved horizon 10⁻²")
    for r in records:
        shown = ["–" if r[key] is None else f"{r[key]:.4g}" for key in ("mean", "certified_rate", "certified_horizon")]
        table.add_row(r["model"], r["variant"], *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
