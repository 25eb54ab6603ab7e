"""The model `wavenet` (van den Oord et al. 2016, arXiv:1609.03499): dilated gated convolutions, skips to the output."""

import torch
from torch import Tensor, nn

from unrecurrent.models.causal_conv import CausalConv1d, empty_queues
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size


class GatedBlock(nn.Module):
    """One gated unit, `z = tanh(W ∗ x) ⊙ σ(V ∗ x)`: `S z` skips to the output, `x + R z` goes to the next block.

    The last block has no next one, and no R.
    """

    def __init__(self, width: int, kernel_size: int, dilation: int, dropout: float, last: bool):
        super().__init__()
        self.convolution = CausalConv1d(width, 2 * width, kernel_size, dilation, normed=False)
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv1d(width, width, 1)
        self.residual = None if last else nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, queue: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Read `(B, H, T)` after `queue`; return what skips to the output, what goes on, and the next queue."""
        both, queue = self.convolution(x, queue)
        filtered, gate = both.chunk(2, 1)
        unit = self.dropout(torch.tanh(filtered) * torch.sigmoid(gate))
        return self.skip(unit), x if self.residual is None else x + self.residual(unit), queue


class WaveNet(SequenceModel):
    """A causal convolution, then `cycles` times gated blocks with dilation 1, 2, …, 2^(layers−1), their skips summed.

    `relu(A relu(Σ skips))` is read out; trained on quantised waveforms the readout is the paper's softmax. Receptive
    field `1 + (K−1)(1 + cycles (2^layers − 1))`.
    """

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 64,
        layers: int = 5,
        cycles: int = 2,
        kernel_size: int = 2,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, 0.0, input_dropout, tied)
        self.front = CausalConv1d(width, hidden_size, kernel_size, normed=False)
        blocks = layers * cycles
        self.blocks = nn.ModuleList(
            GatedBlock(hidden_size, kernel_size, 2 ** (i % layers), dropout, last=i == blocks - 1)
            for i in range(blocks)
        )
        self.mix = nn.Conv1d(hidden_size, hidden_size, 1)
        self.receptive_field = 1 + (kernel_size - 1) * (1 + cycles * (2**layers - 1))

    def init_cache(self, batch: int) -> Cache:
        return empty_queues(self, batch)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x, queue = self.front(encoded.transpose(1, 2), cache[0])
        after, skips = [queue], []
        for block, queue in zip(self.blocks, cache[1:], strict=True):
            skip, x, queue = block(x, queue)
            skips.append(skip)
            after.append(queue)
        mixed = self.mix(sum(skips[1:], skips[0]).relu()).relu()
        return mixed.transpose(1, 2), tuple(after)
