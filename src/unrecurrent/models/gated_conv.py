"""The gated convolutional model `gated-conv` (Dauphin, Fan, Auli and Grangier 2017, arXiv:1612.08083)."""

from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.models.causal_conv import CausalConv1d, empty_queues
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size


class GatedConv(SequenceModel):
    """Causal convolutions with gated linear units, `(X∗W + b) ⊙ σ(X∗V + c)`, and residual connections.

    Receptive field `1 + layers (K−1)`.
    """

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 100,
        layers: int = 3,
        kernel_size: int = 4,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, 0.0, input_dropout, tied)
        self.convolutions = nn.ModuleList(
            CausalConv1d(width if i == 0 else hidden_size, 2 * hidden_size, kernel_size) for i in range(layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.receptive_field = 1 + layers * (kernel_size - 1)

    def init_cache(self, batch: int) -> Cache:
        return empty_queues(self, batch)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x, after = encoded.transpose(1, 2), []
        for convolution, queue in zip(self.convolutions, cache, strict=True):
            gated, queue = convolution(x, queue)
            inner = self.dropout(F.glu(gated, dim=1))
            x = inner + x if inner.shape == x.shape else inner
            after.append(queue)
        return x.transpose(1, 2), tuple(after)
