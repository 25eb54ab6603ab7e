"""Where a training step spends its time, and what the loop's choices are worth.

    python benchmarks/training_step.py

On the JSB chorales with the recorded recipes at 150,000 parameters, one thread. Medians in milliseconds a step, in
results/training_step.json: `variant` "batching", "forward", "backward", "clip", "optimizer", "project", and beside them
"optimizer, not fused" and "step, random batches" (chorales of any lengths padded to the longest, instead of batches of
similar length; "step" is the same with those).
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unrecurrent.batches import Batch, padded
from unrecurrent.models import build_model, match_parameters
from unrecurrent.recipes import default_parameters, find_recipe
from unrecurrent.records import command_line, make_record, write_records
from unrecurrent.tasks import get_task
from unrecurrent.training import losses, make_optimizer, task_interface, training_batches

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "training_step.json"
MODELS = ("lstm", "rnn", "tcn", "window", "stable-lstm", "certified-lstm")
EPOCHS = 2


class Stopwatch:
    """Collects the milliseconds of named parts."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}

    def __call__(self, part: str, call: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = call()
        self.parts.setdefault(part, []).append(1e3 * (time.perf_counter() - began))
        return result

    def medians(self) -> dict[str, float]:
        return {part: statistics.median(times) for part, times in self.parts.items()}


def measure(name: str) -> dict[str, float]:
    """Return the median milliseconds of each part of a step."""
    task = get_task("jsb")
    examples = task.load("train")
    recipe = find_recipe(task, name)
    interface = task_interface(task)
    settings = match_parameters(name, interface, recipe.settings, default_parameters(task))
    model = build_model(name, interface, settings).train()
    fused = make_optimizer(model, recipe.training)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-12)
    watch = Stopwatch()

    def time_step(batch: Batch, mixed: Batch) -> None:
        fused.zero_grad(set_to_none=True)
        loss = watch("forward", lambda: losses(task, model(batch.inputs), batch).mean())
        watch("backward", loss.backward)
        watch("clip", lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.clip_norm))
        watch("optimizer", fused.step)
        watch("optimizer, not fused", plain.step)
        watch("project", model.project)
        for part, chosen in (("step", batch), ("step, random batches", mixed)):
            watch(part, lambda chosen=chosen: losses(task, model(chosen.inputs), chosen).mean().backward())

    for epoch in range(EPOCHS):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(epoch))
        groups = order.split(recipe.training.batch_size)
        batches = training_batches(task, examples, recipe.training, epoch)
        for chosen in groups:
            time_step(watch("batching", partial(next, batches)), padded([examples[i] for i in chosen.tolist()]))
    return watch.medians()


def main() -> None:
    """Measure every model and print the table."""
    torch.set_num_threads(1)
    measured = {name: measure(name) for name in MODELS}
    parts = list(measured["lstm"])
    write_records(
        OUTPUT,
        [
            make_record(
                command=command_line(),
                task="jsb",
                model=name,
                variant=part,
                metric="ms",
                split="train",
                mean=round(value, 4),
                seeds=1,
            )
            for name, values in measured.items()
            for part, value in values.items()
        ],
    )
    table = Table("part, ms", *MODELS)
    for part in parts:
        table.add_row(part, *(f"{measured[name][part]:.3f}" for name in MODELS))
    Console().print(table)


if __name__ == "__main__":
    main()
