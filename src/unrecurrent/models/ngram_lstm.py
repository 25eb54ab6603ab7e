"""The model `ngram-lstm` (Chelba, Norouzi and Bengio 2017, arXiv:1703.10724): an LSTM over the last k inputs alone."""

from torch import Tensor, nn

from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size
from unrecurrent.truncation import truncate


class NgramLSTM(SequenceModel):
    """`y_t` is read from the state that an LSTM, started from zero `k` inputs back, has reached at t.

    With n = 13 the paper finds it as good as an LSTM with all of the past. Every window is a sequence of its own: all
    outputs are made at once, in k steps. There is no dropout between the layers, where windows would differ in it.
    """

    cache_axis = 1

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 200,
        layers: int = 1,
        k: int = 13,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, dropout, input_dropout, tied)
        self.windows = truncate(nn.LSTM(width, hidden_size, layers, batch_first=True), k)
        self.receptive_field = k

    def init_cache(self, batch: int) -> Cache:
        return tuple(part for state in self.windows.init_cache(batch) for part in state)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        hidden, states = self.windows.advance(encoded, [cache[i : i + 2] for i in range(0, len(cache), 2)])
        return hidden, tuple(part for state in states for part in state)

    def forward_hidden(self, inputs: Tensor) -> Tensor:
        """The same without a cache to hand on: sequences no longer than k are one window each, read in one pass."""
        return self.to_readout(self.windows(self.embedded(inputs)))
