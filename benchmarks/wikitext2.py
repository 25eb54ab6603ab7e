"""The article's table on WikiText-2: train rows, measure them, time them, write the page.

    python benchmarks/wikitext2.py train lstm certified-lstm     # rows by name (none: all); resumable
    python benchmarks/wikitext2.py speed                         # scoring speed of what is trained; nothing else runs
    python benchmarks/wikitext2.py training-speed                # against the plain recipe; nothing else runs
    python benchmarks/wikitext2.py list                          # the rows, and which are done

Checkpoints are kept below runs/wikitext-2; every row's records are written to results/wikitext-2/ROW.json as it ends:
the test perplexity with all that was measured, and one record for each truncation length. The page is made by
benchmarks/wikitext2_page.py.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from unrecurrent import run_parallel
from unrecurrent.bands import band_of_means
from unrecurrent.batches import Batch
from unrecurrent.checkpoint import load_model
from unrecurrent.comparison import DELTA, certificate_on_data, proved
from unrecurrent.jobs import MEMORY, job_folder, run_jobs
from unrecurrent.memory import MemoryProfile
from unrecurrent.models import SequenceModel, build_model, parameter_count
from unrecurrent.models.recurrent import RecurrentModel
from unrecurrent.optimizer_step import OptimizerStep
from unrecurrent.recipes import find_recipe
from unrecurrent.records import Record, commit, make_record, read_records, write_records
from unrecurrent.task_memory import measure_on_task, memory_data
from unrecurrent.tasks import Task, get_task
from unrecurrent.training import (
    make_optimizer,
    task_interface,
    training_batches,
    training_loss,
    with_defaults,
    word_sampler,
)
from unrecurrent.worker import Job
from wikitext2_page import CURVE, FOLDER, TRUNCATED

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "wikitext-2"
#: of a training, two of which run side by side: small models gain little from a second thread
TRAINING_THREADS = 1
#: of everything that is timed
THREADS = 2
POSITIONS = 4096
#: how the scoring speed is taken: on so many words of the test text in one sequence, this often
SCORED, ROUNDS = 32_768, 5
#: training steps timed of each recipe
TIMED = 30


@dataclass(frozen=True)
class Row:
    """One row of a table: a model, what differs from its recipe, and in which table it stands."""

    model: str
    table: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1
    variant: str | None = None


def size(hidden: int) -> dict[str, int]:
    return {"hidden_size": hidden}


ONE_SIZE = "one size"
#: a gated convolution over two words in front of the recurrence
FRONT = {"input_kernel": 2}
FRONT_SHOWN = "gated convolution over 2 words"
#: the certified model designed to win: wider state, that convolution, a rate of 0.995
WINNER = {"hidden_size": 340, "rate": 0.995, **FRONT}
WINNER_SHOWN = f"wider, {FRONT_SHOWN}"
ROWS = {
    "lstm": Row("lstm", ONE_SIZE, size(256), seeds=2),
    "certified-lstm-wide": Row("certified-lstm", ONE_SIZE, WINNER, seeds=2, variant=WINNER_SHOWN),
    "rnn": Row("rnn", ONE_SIZE, size(256)),
    "stable-rnn": Row("stable-rnn", ONE_SIZE, size(256)),
    "certified-lstm": Row("certified-lstm", ONE_SIZE, size(256) | {"rate": 0.995}),
    "stable-lstm": Row("stable-lstm", ONE_SIZE, size(256)),
    "certified-rnn": Row("certified-rnn", ONE_SIZE, size(256) | {"rate": 0.995}),
    "gru": Row("gru", ONE_SIZE, size(256)),
    "certified-gru": Row("certified-gru", ONE_SIZE, size(256) | {"rate": 0.995}),
    "certified-lstm-plain": Row("certified-lstm-plain", ONE_SIZE, size(256) | {"rate": 0.995}),
    "certified-lstm-coupled": Row("certified-lstm-coupled", ONE_SIZE, size(256) | {"rate": 0.995}),
    "mingru": Row("mingru", ONE_SIZE, size(256)),
    "gated-conv": Row("gated-conv", "feed-forward", size(128)),
    "tcn": Row("tcn", "feed-forward", size(136)),
    "window": Row("window", "feed-forward", size(196)),
}
for model, own in (("lstm", {}), ("certified-lstm", {"rate": 0.995})):
    ROWS[f"{model}-front"] = Row(model, ONE_SIZE, size(256) | own | FRONT, variant=FRONT_SHOWN)
for rate in (0.8, 0.95, 0.98, 0.995):
    for model in ("certified-lstm", "certified-gru"):
        ROWS[f"{model}-{rate}"] = Row(model, "price", size(256) | {"rate": rate}, {"epochs": 3})
for model in ("lstm", "stable-lstm", "gru"):
    ROWS[f"{model}-3"] = Row(model, "price", size(256), {"epochs": 3})
# The other way to compare: every model with the decay of its recurrent layers that suits it, of those tried. Three
# epochs, so that the rows above are those with the settings all share: dropout of 0.3, a learning rate of 0.004.
for name, decays in (
    ("lstm-3", (0.1, 0.3)),
    ("certified-lstm-0.995", (0.1, 0.3)),
    ("gru-3", (0.1,)),
    ("certified-gru-0.995", (0.1,)),
    ("stable-lstm-3", (0.1,)),
):
    shared = ROWS[name]
    for decay in decays:
        ROWS[f"{shared.model}-dropout0.3-lr0.004-decay{decay}"] = replace(
            shared, table="own settings", training={**shared.training, "recurrent_weight_decay": decay}
        )
# As large and as long as an hour and a half on one thread allows; more dropout, since the tables are larger. Then anew
# with the decay of the recurrent layers that suits the free LSTM best of those tried above.
LONG = {"embedding_size": 320, "dropout": 0.4, "input_dropout": 0.4}
for suffix, decay in (("", {}), ("-decay0.1", {"recurrent_weight_decay": 0.1})):
    ROWS[f"lstm-long{suffix}"] = Row("lstm", "long", size(320) | LONG, {"epochs": 15, **decay})
    ROWS[f"certified-lstm-long{suffix}"] = Row(
        "certified-lstm", "long", WINNER | size(392) | LONG, {"epochs": 11, **decay}, variant=WINNER_SHOWN
    )
ROWS["lstm-1"] = Row("lstm", "truncated", size(256), {"epochs": 1})
for k in TRUNCATED:
    ROWS[f"ngram-lstm-{k}"] = Row("ngram-lstm", "truncated", size(256) | {"k": k}, {"epochs": 1})


def job(name: str, task: Task, seed: int) -> Job:
    """Return the training of a row, in a folder of its own."""
    row = ROWS[name]
    recipe = find_recipe(task, row.model)
    settings = {**recipe.settings, **row.settings}
    training = replace(recipe.training, seed=seed, **row.training)
    fingerprint = json.dumps([task.digest(), row.model, settings, training.identity()], sort_keys=True)
    folder = job_folder(RUNS, f"{name}-seed{seed}", fingerprint)
    return Job(task.name, None, row.model, settings, training, str(folder), threads=TRAINING_THREADS)


def train(name: str, task: Task, most_seeds: int) -> list[Record]:
    """Train a row from all its seeds, measure the first, and return its records."""
    row = ROWS[name]
    jobs = [job(name, task, seed) for seed in range(min(row.seeds, most_seeds))]
    results = [run_jobs([each], [f"{name}, seed {each.training.seed}"])[0] for each in jobs]
    broken = [result["diverged"] for result in results if "diverged" in result]
    if broken:
        raise SystemExit(f"{name}: {broken[0]}")
    tests = [exp(result["test_loss"]) for result in results]
    over_seeds: dict[str, Any] = {
        "mean": round(statistics.mean(tests), 3),
        "std": round(statistics.stdev(tests), 3) if len(tests) > 1 else None,
        "first_seed": round(tests[0], 3),
        "seeds": len(tests),
        "valid_mean": round(statistics.mean(exp(result["valid_loss"]) for result in results), 3),
        "minutes": round(statistics.mean(undisturbed_minutes(result["history"]) for result in results), 2),
    }
    known = measured_before(name, jobs[0], tests[0])
    if known:
        main = {**known[0], **over_seeds, **trained_with(jobs[0]), "variant": row.variant}
        return [main, *({**cut, "variant": cut_variant(row)} for cut in known[1:])]
    model, _ = load_model(Path(results[0]["folder"]))
    profile = measured(model, task)
    base = {
        "command": f"python benchmarks/wikitext2.py train {name}",
        "task": task.name,
        "model": row.model,
        "metric": "ppl",
        "split": "test",
        "row": name,
        "table": row.table,
        "hidden_size": row.settings["hidden_size"],
        "params": results[0]["parameters"],
        "epochs": results[0]["epochs"],
    }
    main = make_record(
        **base,
        variant=row.variant,
        **over_seeds,
        valid_by_epoch=[round(exp(epoch["valid_loss"]), 2) for epoch in results[0]["history"]],
        receptive_field=model.receptive_field,
        k_star=profile.k(DELTA),
        local_rate=max((layer.local_rate for layer in profile.layers), default=None),
        **trained_with(jobs[0]),
        **proved(model, task),
    )
    cut = [truncated(base, row, profile, tests[0], k) for k in profile.ks] if model.recurrent else []
    return [main, *cut]


def trained_with(job: Job) -> dict[str, Any]:
    training = {key: value for key, value in asdict(job.training).items() if key != "seed"}
    return {"settings": dict(job.settings), "training": training}


def measured_before(name: str, job: Job, test: float) -> list[Record]:
    """Return the records of a row whose first seed, the one that is measured, is the same as it was; else none."""
    path = FOLDER / f"{name}.json"
    known = read_records(path) if path.exists() else []
    same = known and known[0].get("first_seed", known[0]["mean"]) == round(test, 3)
    now = with_defaults(trained_with(job)["training"])
    alike = same and known[0]["settings"] == dict(job.settings) and with_defaults(known[0]["training"]) == now
    return known if alike else []


def undisturbed_minutes(history: Sequence[Mapping[str, float]]) -> float:
    """Return the minutes a training takes: its epochs times the fastest, since it may be paused for other timings."""
    ends = [0.0, *(epoch["seconds"] for epoch in history)]
    return len(history) * min(after - before for before, after in pairwise(ends)) / 60


def measured(model: SequenceModel, task: Task) -> MemoryProfile:
    """Return the truncation curve at the lengths of the table, up to all the model can see, and the local rate."""
    seen = model.receptive_field
    ks = CURVE if seen is None else (*(k for k in CURVE if k < seen), seen)
    return measure_on_task(
        model, task, memory_data(task), ks=ks, positions=POSITIONS, delta=DELTA, exponents=1, steps=512
    )


def cut_variant(row: Row) -> str:
    return ", ".join(filter(None, (row.variant, "truncated, evaluated")))


def truncated(base: Mapping[str, Any], row: Row, profile: MemoryProfile, test: float, k: int) -> Record:
    """Return the perplexity with the last k words only: that of the whole text, times exp of the mean extra loss."""
    extra = profile.losses[profile.ks.index(k)] - profile.full_losses
    (low,), (high,) = band_of_means(extra[None])
    return make_record(
        **{**base, "k": k},
        variant=cut_variant(row),
        mean=round(test * exp(float(np.mean(extra))), 3),
        low=round(test * exp(float(low)), 3),
        high=round(test * exp(float(high)), 3),
        std=None,
        seeds=1,
        positions=POSITIONS,
    )


@torch.no_grad()
def speed(name: str, task: Task) -> list[Record]:
    """Return how much faster `run_parallel` reads a long text than the layers themselves, which are timed alone."""
    row, folder = ROWS[name], Path(job(name, task, 0).folder)
    model, _ = load_model(folder)
    if not isinstance(model, RecurrentModel):
        return []
    (stream,) = task.load("test")
    words = stream.inputs[None, :SCORED].long()
    assert model.embedding is not None
    x, _ = model.layer_inputs(model.embedding(words), model.init_cache(1)[model.state_parts :])
    proof = certificate_on_data(model, task)
    proof_given = proof if proof.stable else None
    seconds: tuple[list[float], list[float]] = ([], [])
    evidence: Any = None
    for turn in range(ROUNDS + 1):
        began = time.perf_counter()
        model.recurrence(x)
        between = time.perf_counter()
        *_, evidence = run_parallel(model.recurrence, x, certificate=proof_given)
        if turn:
            seconds[0].append(between - began)
            seconds[1].append(time.perf_counter() - between)
    sequential, parallel = (statistics.median(part) for part in seconds)
    return [
        make_record(
            command=f"python benchmarks/wikitext2.py speed {name}",
            task=task.name,
            model=row.model,
            variant=", ".join(filter(None, (row.variant, "recurrence by run_parallel"))),
            metric="speedup",
            split="test",
            mean=round(sequential / parallel, 3),
            seeds=1,
            baseline="sequential",
            row=name,
            hidden_size=model.hidden_size,
            recurrence_tokens_per_s=round(SCORED / parallel),
            warmup=evidence.warmup,
            sweeps=evidence.sweeps,
            certified_rate=proof.rate if proof.stable else None,
        )
    ]


def training_speed(task: Task) -> list[Record]:
    """Return how much faster a training step is than that of the plain recipe, for the same LSTM on the same batches.

    Plain, as in PyTorch's word_language_model example: all logits in float32 at once, cross entropy, SGD, gradients
    clipped at 0.25. Steps are taken in turns, in a process that keeps its memory as every training here does.
    """
    recipe = find_recipe(task, "lstm")
    settings, config = {**recipe.settings, **size(256)}, recipe.training
    examples = task.load("train")
    batches = [b for b, _ in zip(training_batches(task, examples, config), range(TIMED + 1), strict=False)]
    plain, own = (build_model("lstm", task_interface(task), settings).train() for _ in range(2))
    sgd = torch.optim.SGD(plain.parameters(), lr=20)
    optimize = OptimizerStep(make_optimizer(own, config), config.clip_norm)
    sampler = word_sampler(task, examples, config)

    def plain_step(batch: Batch) -> None:
        sgd.zero_grad()
        logits = plain(batch.inputs)
        cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.25)
        sgd.step()

    def own_step(batch: Batch) -> None:
        loss, _ = training_loss(own, task, batch, own.init_cache(len(batch.inputs)), config, sampler)
        optimize(loss)

    seconds: dict[str, list[float]] = {"plain": [], "own": []}
    for batch in batches:
        for label, step in (("plain", plain_step), ("own", own_step)):
            began = time.perf_counter()
            step(batch)
            seconds[label].append(time.perf_counter() - began)
    slow, fast = (statistics.median(taken[1:]) for taken in (seconds["plain"], seconds["own"]))
    return [
        make_record(
            command="python benchmarks/wikitext2.py training-speed",
            task=task.name,
            model="lstm",
            variant=f"{config.sampled_words} sampled words, {config.softmax}, {config.batch_size} x {config.piece}",
            metric="speedup",
            split="train",
            mean=round(slow / fast, 3),
            seeds=1,
            baseline="plain-training",
            hidden_size=256,
            params=parameter_count(own),
            train_tokens_per_s=round(batches[0].steps / fast),
            baseline_tokens_per_s=round(batches[0].steps / slow),
        )
    ]


def main() -> None:
    commit()  # that of the records, noted as the run begins
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("train", "speed", "training-speed", "list"))
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--seeds", type=int, default=2, help="train no row from more seeds than this")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.rows if name not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: rows are {', '.join(ROWS)}")
    torch.set_num_threads(THREADS)
    task = get_task("wikitext-2")
    if arguments.verb == "training-speed":
        if not MEMORY.keys() <= os.environ.keys():
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MEMORY})
        write_records(FOLDER / "speed" / "training.json", training_speed(task))
        return
    for name in arguments.rows or ROWS:
        target = FOLDER / f"{name}.json"
        if arguments.verb == "list":
            print(f"{name:44} {ROWS[name].table:14} {'done' if target.exists() else ''}")
        elif arguments.verb == "train":
            records = train(name, task, arguments.seeds)
            write_records(target, records)
            print(name, {key: records[0][key] for key in ("mean", "valid_mean", "params", "minutes", "certified_rate")})
        elif not (target.exists() and job(name, task, 0).result_path.exists()):
            print(f"{name}: not trained here, so that there is nothing to time")
        elif found := speed(name, task):
            write_records(FOLDER / "speed" / f"{name}.json", found)


if __name__ == "__main__":
    main()
