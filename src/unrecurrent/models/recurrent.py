"""The recurrent models `rnn`, `lstm` and `gru`: torch's own layers with their fused kernels."""

from typing import Any, ClassVar

from torch import Tensor, nn

from unrecurrent.certificate import Certificate, certify
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size


class RecurrentModel(SequenceModel):
    """Encoder, a stack of torch recurrent layers, linear readout."""

    recurrent = True
    layer_class: ClassVar[type[nn.Module]]

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 200,
        layers: int = 1,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, dropout, input_dropout)
        self.hidden_size, self.layers = hidden_size, layers
        between = dropout if layers > 1 else 0.0
        self.recurrence = self.layer_class(
            width, hidden_size, layers, batch_first=True, dropout=between, **self.layer_options()
        )

    def layer_options(self) -> dict[str, Any]:
        """Return what the layers take besides sizes and dropout."""
        return {}

    def init_cache(self, batch: int) -> Cache:
        return (self.readout.weight.new_zeros(self.layers, batch, self.hidden_size),)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        hidden, state = self.recurrence(encoded, cache[0])
        return hidden, (state,)

    def certificate(self, **inputs_covered: Any) -> Certificate:
        """Return what can be proved about the recurrence in evaluation mode.

        A model of symbols is certified for its embedding table, which is every input there is; for features say
        which inputs to cover as for `certify` (`inputs=`, `input_bound=`, or nothing for all).
        """
        if self.embedding is not None:
            inputs_covered = {**inputs_covered, "embedding": self.embedding}
        return certify(self.recurrence, **inputs_covered)


class RNN(RecurrentModel):
    """The tanh RNN, `h_t = tanh(W h_{t-1} + U x_t + b)`."""

    layer_class: ClassVar[type[nn.Module]] = nn.RNN


class GRU(RecurrentModel):
    """The gated recurrent unit in torch's form, with the reset gate after the product."""

    layer_class: ClassVar[type[nn.Module]] = nn.GRU


class LSTM(RecurrentModel):
    """The long short-term memory in torch's form."""

    layer_class: ClassVar[type[nn.Module]] = nn.LSTM

    def init_cache(self, batch: int) -> Cache:
        (zero,) = super().init_cache(batch)
        return zero, zero

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        hidden, state = self.recurrence(encoded, cache)
        return hidden, state
