"""The copy memory task `copy`: repeat ten symbols after a long blank (Hochreiter and Schmidhuber 1997)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from unrecurrent.tasks.generated import GeneratedTask
from unrecurrent.tasks.symbols import SymbolTask
from unrecurrent.tasks.task import Example, Metric, Split

#: symbols to remember; 0 is the blank, 1 … 8 are symbols, 9 asks for them
RECALLED, SYMBOLS, ASK = 10, 8, 9


class CopyTask(GeneratedTask, SymbolTask):
    """Ten symbols of eight, `T − 1` blanks, then eleven marks: the last ten outputs are the symbols, all before blank.

    Inputs and targets are int64 `(T + 20,)`. The metric is the loss that Bai, Kolter and Koltun (2018, section 5.2)
    report: the mean over *all* `T + 20` steps, in nats. Whoever remembers nothing gets `10 ln 8 / (T + 20)`: 0.0204 for
    T = 1000. Published there for T = 1000: TCN 3.5e-5, LSTM 0.0204, RNN 0.0202.

    >>> task = CopyTask("copy:T=3")
    >>> example = task.load("test")[0]
    >>> torch.equal(example.targets[-10:], example.inputs[:10]), example.inputs[10:].tolist()
    (True, [0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9])
    """

    base, default, least = "copy", 1000, 1
    sizes: ClassVar[dict[Split, int]] = {"train": 10_000, "valid": 1_000, "test": 1_000}
    metric = Metric("nll", "lower", "nats a step")
    vocabulary = outputs = SYMBOLS + 2

    @property
    def chance(self) -> float:
        """The loss of one who knows when symbols are due, and not which."""
        return RECALLED * math.log(SYMBOLS) / (self.length + 2 * RECALLED)

    def draw(self, count: int, random: np.random.RandomState) -> Sequence[Example]:
        symbols = torch.from_numpy(random.randint(1, SYMBOLS + 1, (count, RECALLED))).long()
        blanks = symbols.new_zeros(count, self.length - 1)
        inputs = torch.cat([symbols, blanks, symbols.new_full((count, RECALLED + 1), ASK)], 1)
        targets = torch.cat([symbols.new_zeros(count, self.length + RECALLED), symbols], 1)
        return [Example(x, y) for x, y in zip(inputs, targets, strict=True)]
