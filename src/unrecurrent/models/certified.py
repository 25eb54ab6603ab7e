"""The models `certified-rnn`, `certified-lstm`, `certified-gru`: their layers keep a proved rate while they train."""

from typing import Any

from unrecurrent.models.bounded import BoundedInputs
from unrecurrent.models.recurrent import GRU, LSTM, RNN, RecurrentModel
from unrecurrent.models.sequence_model import Interface
from unrecurrent.stability import StableGRU, StableLSTM, StableRNN

RATE = 0.98


class Certified(RecurrentModel):
    """Mixed into a recurrent model whose layer takes the contraction `rate` to keep."""

    def __init__(self, interface: Interface, rate: float = RATE, **settings: Any):
        self.rate = rate
        super().__init__(interface, **settings)

    def layer_options(self) -> dict[str, Any]:
        return {"rate": self.rate}


class CertifiedRNN(Certified, RNN):
    """A tanh RNN that contracts at `rate`, whatever it reads."""

    layer_class = StableRNN


class CertifiedLSTM(Certified, LSTM):
    """An LSTM with coupled gates and a ceiling on the forget gate that contracts at `rate`, whatever it reads."""

    layer_class = StableLSTM


class CertifiedGRU(BoundedInputs, Certified, GRU):
    """A gated recurrent unit that contracts at `rate` on inputs bounded by 1 entry by entry."""

    layer_class = StableGRU

    def layer_options(self) -> dict[str, Any]:
        return {**super().layer_options(), "input_bound": self.input_bound}

    def project(self) -> None:
        self.clip_embedding()
