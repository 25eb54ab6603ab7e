"""The models `stable-rnn` and `stable-lstm`: Miller and Hardt's conditions (ICLR 2019, arXiv:1805.10369).

They are held by projection after each optimizer step; the kernels stay torch's own.
"""

from typing import Any

from unrecurrent.models.bounded import BoundedInputs
from unrecurrent.models.recurrent import LSTM, RNN
from unrecurrent.models.sequence_model import Interface
from unrecurrent.stability import StableRNN as StableRNNLayer
from unrecurrent.stability import stabilize

#: the paper asks for a spectral norm below 1; at exactly 1 there would be no rate
SPECTRAL_BOUND = 0.99
#: the paper's bound on the entries of an embedding
EMBEDDING_BOUND = 0.75


class StableRNN(RNN):
    """A tanh RNN with `‖W‖₂ ≤ 0.99`, the largest singular values clipped."""

    layer_class = StableRNNLayer

    def layer_options(self) -> dict[str, Any]:
        return {"rate": SPECTRAL_BOUND}


class StableLSTM(BoundedInputs, LSTM):
    """An LSTM under the paper's four conditions on row sums, for inputs bounded entry by entry."""

    def __init__(self, interface: Interface, **settings: Any):
        super().__init__(interface, **settings)
        self.input_bound = EMBEDDING_BOUND if self.embedding is not None else 1.0
        self.project()

    def project(self) -> None:
        self.clip_embedding()
        stabilize(self.recurrence, method="miller-hardt", input_bound=self.input_bound)
