"""The adding problem `adding`: the sum of the two marked numbers of a sequence (Hochreiter and Schmidhuber 1997)."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from unrecurrent.tasks.generated import GeneratedTask
from unrecurrent.tasks.task import Example, Metric, Split, last_step, squared_error

#: sequences drawn at a time, so that their float64 numbers are never all there at once
_BLOCK = 1_000


class AddingTask(GeneratedTask):
    """Numbers uniform in [0, 1] beside marks that are 1 at two random steps: what is the sum of the marked numbers?

    Inputs float32 `(T, 2)`, number and mark; the answer is given at the last step, the only one that counts, and scored
    by its squared error. Saying 1 whatever is read costs 1/6 = 0.167. Published for T = 600: TCN 5.8e-5, LSTM 0.164,
    RNN 0.177 (Bai, Kolter and Koltun 2018, table 1).

    >>> example = AddingTask("adding:T=5").load("test")[0]
    >>> torch.allclose((example.inputs[:, 0] * example.inputs[:, 1]).sum(), example.targets[-1])
    True
    """

    base, default = "adding", 600
    sizes: ClassVar[dict[Split, int]] = {"train": 50_000, "valid": 1_000, "test": 1_000}
    metric = Metric("mse", "lower", "squared error of the sum")
    features = 2
    outputs = 1

    def draw(self, count: int, random: np.random.RandomState) -> Sequence[Example]:
        blocks = [self._block(min(_BLOCK, count - start), random) for start in range(0, count, _BLOCK)]
        inputs = torch.from_numpy(np.concatenate(blocks))
        sums = (inputs[..., 0] * inputs[..., 1]).sum(1)
        return [Example(x, y.expand(self.length, 1)) for x, y in zip(inputs, sums, strict=True)]

    def _block(self, count: int, random: np.random.RandomState) -> np.ndarray:
        inputs = np.zeros((count, self.length, 2), np.float32)
        inputs[..., 0] = random.random_sample((count, self.length))
        first, second = random.randint(self.length, size=count), random.randint(self.length - 1, size=count)
        rows = np.arange(count)
        inputs[rows, first, 1] = inputs[rows, second + (second >= first), 1] = 1
        return inputs

    @property
    def chance(self) -> float:
        """The squared error of always saying 1, the mean of the sums."""
        sums = torch.stack([example.targets[-1] for example in self.load("test")])
        return float((sums - 1).square().mean())

    def mask(self, example: Example) -> Tensor:
        return last_step(example)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of every step `(B, T)` from outputs and sums `(B, T, 1)`."""
        return squared_error(outputs, targets)
