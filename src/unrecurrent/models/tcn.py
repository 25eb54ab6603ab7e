"""The temporal convolutional network `tcn` (Bai, Kolter and Koltun 2018, arXiv:1803.01271)."""

from torch import Tensor, nn

from unrecurrent.models.causal_conv import CausalConv1d, empty_queues
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size


class ResidualBlock(nn.Module):
    """Two dilated causal convolutions, each with ReLU and dropout, around a residual connection."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int, dropout: float):
        super().__init__()
        self.first = CausalConv1d(inputs, outputs, kernel_size, dilation)
        self.second = CausalConv1d(outputs, outputs, kernel_size, dilation)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        inner, first = self.first(x, cache[0])
        inner, second = self.second(self.dropout(inner.relu()), cache[1])
        return (self.dropout(inner.relu()) + self.shortcut(x)).relu(), (first, second)


class TCN(SequenceModel):
    """Residual blocks with dilation 1, 2, 4, …: receptive field `1 + 2 (K−1)(2^layers − 1)`."""

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 100,
        layers: int = 2,
        kernel_size: int = 3,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, 0.0, input_dropout, tied)
        self.blocks = nn.ModuleList(
            ResidualBlock(width if i == 0 else hidden_size, hidden_size, kernel_size, 2**i, dropout)
            for i in range(layers)
        )
        self.receptive_field = 1 + 2 * (kernel_size - 1) * (2**layers - 1)

    def init_cache(self, batch: int) -> Cache:
        return empty_queues(self, batch)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x, after = encoded.transpose(1, 2), []
        for i, block in enumerate(self.blocks):
            x, queues = block(x, cache[2 * i : 2 * i + 2])
            after.extend(queues)
        return x.transpose(1, 2), tuple(after)
