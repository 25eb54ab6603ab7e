"""Run the recurrent layers trained on the JSB chorales in parallel over one long stream of chorales.

    unrecurrent compare jsb --models rnn,stable-rnn,... --seeds 3 --trials 6 --runs runs
    python benchmarks/parallel_jsb.py --runs runs

All chorales of the task, one behind the other (22,752 chords), are one sequence (B = 1). Each layer runs once as
torch runs it and once by `run_parallel`, with a certificate where there is one; runs are interleaved, medians compared.
Records go to results/parallel_jsb.json: metric "speedup" (baseline "torch"), and "error", the largest difference of any
output or final state from the sequential run; the key `evidence` holds what the run said of itself.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from certificates import trained
from unrecurrent import run_parallel
from unrecurrent.comparison import certificate_on_data
from unrecurrent.models.recurrent import RecurrentModel
from unrecurrent.records import Record, command_line, make_record, write_records
from unrecurrent.speed import timed
from unrecurrent.tasks import SPLITS, Task, get_task

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "parallel_jsb.json"
TOL, ROUNDS = 1e-4, 5


def largest_difference(a: object, b: object) -> float:
    """Return the largest difference of two tensors or tuples of them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return float((a - b).abs().max())
    assert isinstance(a, tuple)
    assert isinstance(b, tuple)
    return max(largest_difference(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def measure(name: str, model: RecurrentModel, task: Task, stream: Tensor) -> list[Record]:
    """Return speed-up and error of one model's recurrent layer on the stream."""
    layer = model.eval().recurrence
    certificate = certificate_on_data(model, task)
    proof = certificate if certificate.stable else None
    y, state, evidence = run_parallel(layer, stream, tol=TOL, certificate=proof)
    y_true, state_true = layer(stream)
    said = evidence.to_dict()
    error = max(largest_difference(y, y_true), largest_difference(state, state_true))
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(ROUNDS):
        seconds[0].append(timed(lambda: layer(stream)))
        seconds[1].append(timed(lambda: run_parallel(layer, stream, tol=TOL, certificate=proof)))
    speedup = statistics.median(seconds[0]) / statistics.median(seconds[1])
    about = {
        "task": task.name,
        "model": name,
        "variant": "certificate" if proof else "pilot",
        "split": "test",
        "std": None,
        "seeds": 1,
        "command": command_line(),
        "hidden_size": model.hidden_size,
        "certified_rate": proof.rate if proof else None,
        "evidence": {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in said.items()},
    }
    return [
        make_record(metric="speedup", mean=round(speedup, 3), baseline="torch", **about),
        make_record(metric="error", mean=error, **about),
    ]


def main() -> None:
    """Measure every trained recurrent model and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    task = get_task("jsb")
    stream = torch.cat([x for split in SPLITS for x, _ in task.load(split)])[None]
    models = {name: group[0] for name, group in trained(options.runs, task).items()}
    records = [record for name, model in models.items() for record in measure(name, model, task, stream)]
    write_records(OUTPUT, records)
    table = Table("model", "mode", "error", "mismatch", "sweeps", "proved bound", "depth", "speed-up")
    for speed, error in zip(records[::2], records[1::2], strict=True):
        said = speed["evidence"]
        bound = "–" if said["bound"] is None else f"{said['bound']:.1e}"
        table.add_row(
            speed["model"],
            said["mode"],
            f"{error['mean']:.1e}",
            "–" if said["max_mismatch"] is None else f"{said['max_mismatch']:.1e}",
            str(said["sweeps"]),
            bound,
            f"{said['sequential_depth']} of {said['steps']}",
            f"{speed['mean']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
