"""How fast models train, score and generate: interleaved rounds on the same batches, medians."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch

from unrecurrent.batches import Batch
from unrecurrent.models import SequenceModel
from unrecurrent.optimizer_step import OptimizerStep
from unrecurrent.softmax import WordSampler
from unrecurrent.tasks.task import Task
from unrecurrent.training import (
    TrainingConfig,
    make_optimizer,
    scored_batches,
    train_steps,
    training_batches,
    training_loss,
    word_sampler,
)
from unrecurrent.training import score as score_batch

ROUNDS = 7
GENERATED_STEPS = 32


class Speed(NamedTuple):
    """Steps a second: training and scoring on whole batches, generation one step after another at batch 1."""

    train: float
    score: float
    generate: float


def measure_speed(
    models: Mapping[str, SequenceModel], task: Task, training: TrainingConfig, rounds: int = ROUNDS
) -> dict[str, Speed]:
    """Return the speed of each model on batches of median length, as they are trained and scored.

    Every round times all models one after another, so that a slow moment of the machine hits all alike; the median over
    rounds is reported and one round before is thrown away. The models given are not changed.
    """
    examples = task.load("train")
    train = _typical(partial(training_batches, task, examples, training))
    score = _typical(partial(scored_batches, task, task.load("valid")))
    sampler = word_sampler(task, examples, training)
    timers = {
        name: timers_of(copy.deepcopy(model), task, train, score, training, sampler) for name, model in models.items()
    }
    seconds: dict[str, list[list[float]]] = {name: [[], [], []] for name in models}
    for turn in range(rounds + 1):
        for name, calls in timers.items():
            for kept, call in zip(seconds[name], calls, strict=True):
                took = timed(call)
                if turn > 0:
                    kept.append(took)
    steps = (train.tokens, score.tokens, GENERATED_STEPS)
    return {
        name: Speed(*(n / statistics.median(kept) for n, kept in zip(steps, kinds, strict=True)))
        for name, kinds in seconds.items()
    }


def epochs_within(minutes: float, models: Mapping[str, SequenceModel], task: Task, training: TrainingConfig) -> float:
    """Return how many passes over the training data the slowest of the models makes in so many minutes.

    On one thread, as trainings run side by side; a few steps of each are timed.
    """
    with one_thread():
        slowest = min(speed.train for speed in measure_speed(models, task, training, rounds=3).values())
    passes = 60 * minutes * slowest / train_steps(task)
    return int(passes) if passes >= 1 else float(f"{passes:.2g}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread meanwhile: no time goes into threads that wait, and sums are taken in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _typical(batches: Callable[[], Iterator[Batch]]) -> Batch:
    """Return the batch of median length, made twice rather than kept with all others."""
    lengths = [batch.inputs.shape[1] for batch in batches()]
    middle = sorted(range(len(lengths)), key=lambda i: lengths[i])[len(lengths) // 2]
    return next(islice(batches(), middle, None))


def timed(call: Callable[[], object]) -> float:
    """Return the seconds a call takes."""
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timers_of(
    model: SequenceModel,
    task: Task,
    train: Batch,
    score: Batch,
    training: TrainingConfig,
    sampler: WordSampler | None = None,
) -> tuple[Callable[[], None], ...]:
    """Return what is timed: one training step, clipping included, one scoring pass, a few steps of generation.

    Where a task has two parts, what is written after the separator is generated; reading up to it is not timed.

    A copy of the model is trained: a stable model that goes from training to evaluation makes its weights exact, which
    is no part of scoring.
    """
    train, score = train.to(model.device), score.to(model.device)
    scored, model = model.eval(), copy.deepcopy(model)
    step = OptimizerStep(make_optimizer(model, TrainingConfig(learning_rate=1e-12)), training.clip_norm)

    def train_step() -> None:
        model.train()
        loss, _ = training_loss(model, task, train, model.init_cache(len(train.inputs)), training, sampler)
        step(loss)
        model.project()

    @torch.no_grad()
    def score_pass() -> None:
        score_batch(scored, task, score, scored.init_cache(len(score.inputs)))

    with torch.no_grad():
        read, written = scored.init_cache(1), score.inputs[:1]
        if task.separator is not None and score.mask is not None:
            counted = score.mask[0].nonzero().flatten()
            read = scored.advance(written[:, : counted[0] + 1], read)[1]
            written = score.targets[:1, counted]

    @torch.no_grad()
    def generate() -> None:
        cache = read
        for t in range(GENERATED_STEPS):
            _, cache = scored.step(written[:, t % written.shape[1]], cache)

    return train_step, score_pass, generate
