"""What all tasks share that predict one of several symbols: the cross-entropy and the share of right answers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from unrecurrent.tasks.task import Metric, Task

ACCURACY = Metric("acc", "higher", "percent", of_predictions=True)


class SymbolTask(Task):
    """Predict one of `outputs` symbols a step; where predictions are judged, by the share of right ones."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return `-log p` of the right symbol at every step, in nats `(B, T)`, from logits `(B, T, V)`.

        >>> from unrecurrent.tasks import get_task
        >>> get_task("ptb-char").loss(torch.zeros(1, 2, 50), torch.tensor([[7, 49]])).exp().round()
        tensor([[50., 50.]])
        """
        return cross_entropy(outputs.flatten(0, 1), targets.flatten().long(), reduction="none").view_as(targets)

    def judge(self, predicted: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """Return how many per cent of all symbols are right."""
        return 100 * float((torch.cat(list(predicted)) == torch.cat(list(wanted))).double().mean())
