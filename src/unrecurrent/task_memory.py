"""The memory of a model on the test data of its task, in the units the task is judged by."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unrecurrent.batches import scoring_columns
from unrecurrent.memory import MemoryProfile, measure_memory
from unrecurrent.models import Cache, SequenceModel
from unrecurrent.softmax import linear_losses
from unrecurrent.tasks.task import Example, Task


def memory_data(task: Task) -> list[Example]:
    """Return the test data for the truncation curve; a stream is cut into the columns it is scored in."""
    examples = list(task.load("test"))
    if not task.stream:
        return examples
    cut = []
    for inputs, targets in examples:
        size = max(1, len(inputs) // scoring_columns(len(inputs)))
        columns = zip(inputs.split(size), targets.split(size), strict=True)
        cut += [Example(x, y) for x, y in columns if len(x) == size]
    return cut


def measure_on_task(model: SequenceModel, task: Task, data: Sequence[Example], **settings: Any) -> MemoryProfile:
    """Return the memory profile of a model by the loss of its task, at the steps that count.

    `settings` go to `measure_memory`. Where predictions are judged, the curve is still that of the loss, in nats.
    """
    exponential = task.metric.exponential
    if task.large_vocabulary:
        return measure_memory(_Features(model), data, _WordLoss(model), exponential=exponential, **settings)
    scale = task.metric.scale

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return scale * task.loss(outputs, targets)

    masks = [mask for example in data if (mask := task.mask(example)) is not None]
    return measure_memory(model, data, loss, exponential=exponential, masks=masks or None, **settings)


class _Features(nn.Module):
    """A model before its readout: what a large softmax reads is small, its logits for all steps would not be."""

    def __init__(self, model: SequenceModel) -> None:
        super().__init__()
        self.model, self.recurrent = model, model.recurrent

    def init_cache(self, batch: int) -> Cache:
        return self.model.init_cache(batch)

    def advance(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        return self.model.advance_hidden(inputs.long(), cache)

    def step(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        hidden, cache = self.advance(inputs.unsqueeze(1), cache)
        return hidden.squeeze(1), cache

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.forward_hidden(inputs.long())


class _WordLoss:
    """The loss of every step from features `(B, T, H)` and words `(B, T)`, exactly normalised."""

    def __init__(self, model: SequenceModel) -> None:
        self.readout = model.readout

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        rows, words = hidden.flatten(0, 1), targets.flatten().long()
        if torch.is_grad_enabled():  # asked for on a few predictions only
            found = cross_entropy(self.readout(rows), words, reduction="none")
        else:
            found = linear_losses(rows, self.readout.weight, self.readout.bias, words)
        return found.view(targets.shape)
