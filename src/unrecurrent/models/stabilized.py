"""The models `certified-lstm-plain` and `certified-lstm-coupled`: ordinary LSTMs that `stabilize` keeps at a rate."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from unrecurrent.models.bounded import BoundedInputs
from unrecurrent.models.certified import RATE
from unrecurrent.models.recurrent import LSTM
from unrecurrent.models.sequence_model import Interface
from unrecurrent.stability import Constraint, stabilize

#: steps after which the range of the drive over the whole embedding table is computed anew
SETTLE_EVERY = 100


class PlainLSTM(BoundedInputs, LSTM):
    """An ordinary LSTM with a certified rate for its embedding table, or for features bounded by 1 entry by entry.

    The rows of W are held in each step. The range of the drive over a table costs as much as some steps of training:
    it is recomputed now and then, and before weights are scored and kept, so that what is kept is certified.
    """

    coupled: ClassVar[bool] = False
    held_steps: Tensor

    def __init__(self, interface: Interface, rate: float = RATE, **settings: Any):
        super().__init__(interface, **settings)
        self.rate = rate
        self._constraint: Constraint | None = None
        self.register_buffer("held_steps", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_forget_constraint)
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        # A constraint belongs to the tensors it was made for: a copy makes its own.
        return {**self.__dict__, "_constraint": None}

    @property
    def constraint(self) -> Constraint:
        if self._constraint is None:
            covered: dict[str, Any] = {"input_bound": 1.0}
            if self.embedding is not None:
                covered = {"embedding": self.embedding}
            self._constraint = stabilize(self.recurrence, rate=self.rate, coupled=self.coupled, **covered)
        return self._constraint

    def settle(self) -> None:
        self.constraint.project()

    def project(self) -> None:
        self.held_steps += 1
        if self.held_steps % SETTLE_EVERY == 0:
            self.constraint.project()
        else:
            self.constraint.hold()


def _forget_constraint(model: PlainLSTM, _: object) -> None:
    """Have the constraint made anew when it is next needed: other weights have come."""
    model._constraint = None


class CoupledLSTM(PlainLSTM):
    """An ordinary LSTM whose input gate is tied to its forget gate, i = 1 − f, with a certified rate."""

    coupled = True
