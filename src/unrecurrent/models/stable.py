"""The models `stable-rnn` and `stable-lstm`: Miller and Hardt's conditions (ICLR 2019, arXiv:1805.10369).

The recurrent layer stays torch's own; `project` returns it to the constraint set after each optimizer step.
"""

from typing import Any

import torch
from torch import Tensor

from unrecurrent.models.recurrent import LSTM, RNN
from unrecurrent.models.sequence_model import Interface
from unrecurrent.stability import stabilize

#: the paper's bound on the entries of an input, used for embeddings; features are bounded by the task
EMBEDDING_BOUND = 0.75


def bounded(inputs: Tensor, bound: float) -> Tensor:
    """Return the inputs clipped to `[-bound, bound]`, so that the stated input bound holds for any data."""
    return inputs.clamp(-bound, bound)


class StableRNN(RNN):
    """A tanh RNN with `‖W‖₂ ≤ 1 − δ`, enforced by projecting the singular values."""

    def __init__(self, interface: Interface, **settings: Any):
        super().__init__(interface, **settings)
        self.constraint = stabilize(self.recurrence, method="miller-hardt")

    def project(self) -> None:
        self.constraint.project()


class StableLSTM(LSTM):
    """An LSTM under the paper's four conditions on row sums, for inputs bounded entry by entry.

    The bound must hold for what reaches the layer in evaluation mode. Embeddings are projected to ±0.75;
    features are clipped to ±1, which leaves piano rolls as they are. Input dropout scales what is kept by
    `1/(1−p)` in training only, where no certificate is claimed.
    """

    def __init__(self, interface: Interface, **settings: Any):
        super().__init__(interface, **settings)
        self.input_bound = EMBEDDING_BOUND if self.embedding is not None else 1.0
        self.constraint = stabilize(self.recurrence, method="miller-hardt", input_bound=self.input_bound)
        self.project()

    def project(self) -> None:
        if self.embedding is not None:
            with torch.no_grad():
                self.embedding.weight.clamp_(-self.input_bound, self.input_bound)
        self.constraint.project()

    def advance_body(self, encoded: Tensor, cache: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self.embedding is None and not self.training:
            encoded = bounded(encoded, self.input_bound)
        return super().advance_body(encoded, cache)
