"""The autoregressive model `window`: a multi-layer perceptron over the last k inputs."""

from torch import Tensor, nn

from unrecurrent.models.causal_conv import CausalConv1d, empty_queues
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size


class Window(SequenceModel):
    """ReLU layers over the concatenation of the last `k` inputs; zeros stand before the first one.

    The first layer is a convolution with kernel `k`, which is the same product for all steps at once.
    """

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 200,
        layers: int = 2,
        k: int = 8,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, 0.0, input_dropout, tied)
        self.window = CausalConv1d(width, hidden_size, k, normed=False)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layers - 1))
        self.dropout = nn.Dropout(dropout)
        self.receptive_field = k

    def init_cache(self, batch: int) -> Cache:
        return empty_queues(self, batch)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        hidden, queue = self.window(encoded.transpose(1, 2), cache[0])
        hidden = self.dropout(hidden.transpose(1, 2).relu())
        for layer in self.layers:
            hidden = self.dropout(layer(hidden).relu())
        return hidden, (queue,)
