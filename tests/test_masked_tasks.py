"""Tasks that count some steps only and are judged by what is predicted: batches, training, memory."""

import pytest
import torch

from unrecurrent.batches import padded
from unrecurrent.errors import InputError
from unrecurrent.memory import measure_memory
from unrecurrent.models import build_model
from unrecurrent.recipes import TrainingConfig
from unrecurrent.task_memory import measure_on_task
from unrecurrent.tasks.symbols import ACCURACY, SymbolTask
from unrecurrent.tasks.task import Example, Metric, last_step
from unrecurrent.training import TrainingRun, assess, batch_count, evaluate, losses, task_interface, training_batches


class Recall(SymbolTask):
    """Say after a sequence of noise which of three symbols came two steps before its end."""

    name, metric = "recall", ACCURACY
    vocabulary = outputs = 3

    def load(self, split):
        generator = torch.Generator().manual_seed({"train": 1, "valid": 2, "test": 3}[split])
        sequences = [torch.randint(3, (length,), generator=generator) for length in (5, 7, 7, 8, 9) * 20]
        return [Example(s, s[-3].expand(len(s))) for s in sequences]

    def mask(self, example):
        return last_step(example)


@pytest.fixture
def task():
    return Recall()


def test_only_masked_steps_count(task):
    batch = padded(task.load("train")[:5], task.mask)
    assert batch.mask.sum(1).tolist() == [1] * 5
    assert batch.mask.int().argmax(1).tolist() == [4, 6, 6, 7, 8]
    assert (batch.steps, batch.tokens) == (5, 36)
    outputs = torch.randn(5, 9, 3)
    loss = losses(task, outputs, batch)
    by_hand = [
        torch.nn.functional.cross_entropy(outputs[i, t], batch.targets[i, t]) for i, t in enumerate((4, 6, 6, 7, 8))
    ]
    assert torch.allclose(loss, torch.stack(by_hand))


def test_accuracy_is_the_share_of_right_answers_at_the_steps_that_count(task):
    predicted = [torch.tensor([0]), torch.tensor([2]), torch.tensor([1]), torch.tensor([1])]
    wanted = [torch.tensor([0]), torch.tensor([1]), torch.tensor([1]), torch.tensor([1])]
    assert task.judge(predicted, wanted) == 75.0
    model = build_model("window", task_interface(task), {"hidden_size": 4, "k": 2}).eval()
    examples = task.load("test")
    right = [int(model(e.inputs[None])[0, -1].argmax() == e.targets[-1]) for e in examples]
    scores = assess(model, task, examples)
    assert scores.metric == pytest.approx(100 * sum(right) / len(right))
    assert scores.loss == evaluate(model, task, examples)


def test_training_and_memory_see_the_same_steps(task):
    config = TrainingConfig(epochs=20, learning_rate=1e-2, batch_size=10)
    run = TrainingRun(task, "window", {"hidden_size": 32, "k": 4, "embedding_size": 8}, config)
    model = run.run()
    assert run.progress.tokens == 20 * sum(len(e.inputs) for e in task.load("train"))
    test = assess(model, task, task.load("test"))
    assert test.metric > 95
    history = run.progress.history
    assert run.progress.best_epoch == 1 + min(range(20), key=lambda i: history[i]["valid_loss"])
    assert {"valid_loss", "valid_metric"} <= set(history[0])
    profile = measure_on_task(model, task, task.load("test"))
    assert len(profile.full_losses) == 100
    assert profile.full == pytest.approx(test.loss, rel=1e-5)
    assert profile.k(0.5) == 3


@pytest.mark.parametrize(("direction", "best"), [("higher", 2), ("lower", 1)])
def test_a_task_may_select_its_epoch_by_the_metric(task, direction, best, monkeypatch):
    values = iter([50.0, 70.0, 60.0] if direction == "higher" else [50.0, 60.0, 70.0])
    task.metric, task.selected_by_metric = Metric("m", direction, "", of_predictions=True), True
    monkeypatch.setattr(Recall, "judge", lambda self, predicted, wanted: next(values))
    run = TrainingRun(task, "rnn", {"hidden_size": 3}, TrainingConfig(epochs=3, learning_rate=1e-3))
    run.run()
    assert run.progress.best_epoch == best
    assert run.progress.best_loss == run.progress.history[best - 1]["valid_loss"]


def test_epochs_differ_in_order_but_not_in_what_they_hold(task):
    config = TrainingConfig(batch_size=7)
    epochs = [list(training_batches(task, task.load("train"), config, epoch)) for epoch in (0, 1)]
    assert [sum(b.steps for b in batches) for batches in epochs] == [100, 100]
    assert [len(batches) for batches in epochs] == [batch_count(task, task.load("train"), config)] * 2


def test_masks_that_do_not_fit_are_one_sentence(task):
    examples = task.load("test")[:2]
    with pytest.raises(InputError, match="one mask"):
        measure_memory(torch.nn.Identity(), examples, task.loss, masks=[torch.ones(5, dtype=torch.bool)])
    nothing = [torch.zeros(len(e.inputs), dtype=torch.bool) for e in examples]
    with pytest.raises(InputError, match="no step counts"):
        measure_memory(torch.nn.Identity(), examples, task.loss, masks=nothing)
