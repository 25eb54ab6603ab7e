"""The model `seq2seq-conv`: gated convolutions with position embeddings that attend in each layer.

(Gehring, Auli, Grangier, Yarats and Dauphin 2017, arXiv:1705.03122.)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.models.causal_conv import CausalConv1d, empty_queues
from unrecurrent.models.seq2seq import CrossAttention, Seq2Seq
from unrecurrent.models.sequence_model import Cache, Interface

#: positions with an embedding of their own; later ones share the last
POSITIONS = 256
#: keeps the variance of a sum of two
_HALF = 0.5**0.5


class Positions(nn.Module):
    """Adds an embedding of the position, counted from `start`, to `(B, T, D)`."""

    def __init__(self, width: int):
        super().__init__()
        self.table = nn.Embedding(POSITIONS, width)
        nn.init.normal_(self.table.weight, 0, 0.1)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        return x + self.table(torch.arange(start, start + x.shape[1], device=x.device).clamp_max(POSITIONS - 1))


class Reader(nn.Module):
    """A convolution centred on each position, gated, beside what it reads: `x ← (x + glu(K ∗ x)) / √2`."""

    def __init__(self, width: int, kernel_size: int, dropout: float):
        super().__init__()
        self.convolution = CausalConv1d(width, 2 * width, kernel_size)
        self.ahead = (kernel_size - 1) // 2
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        seen = (self.dropout(x) * present[..., None]).transpose(1, 2)
        queue = self.convolution.queue(len(x))
        # Causal, then moved: an output at t sees as far ahead as behind.
        gated, _ = self.convolution(F.pad(seen, (0, self.ahead)), queue)
        return (x + F.glu(gated[..., self.ahead :], 1).transpose(1, 2)) * _HALF


class Writer(nn.Module):
    """A causal convolution, gated, then attention, each beside what it reads."""

    def __init__(self, width: int, kernel_size: int, heads: int, head_size: int, dropout: float):
        super().__init__()
        self.convolution = CausalConv1d(width, 2 * width, kernel_size)
        self.attention = CrossAttention(width, width, heads, head_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, queue: Tensor, source: Cache, present: Tensor) -> tuple[Tensor, Tensor]:
        gated, queue = self.convolution(self.dropout(x).transpose(1, 2), queue)
        inner = F.glu(gated, 1).transpose(1, 2)
        inner = (inner + self.attention(inner, source, present)) * _HALF
        return (x + inner) * _HALF, queue


class Seq2SeqConv(Seq2Seq):
    """`layers` gated convolutions read, as many causal ones write, each with an attention of its own, then a norm."""

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 192,
        layers: int = 3,
        kernel_size: int = 3,
        heads: int = 4,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 256,
        tied: bool = False,
    ):
        super().__init__(interface, embedding_size, hidden_size, input_dropout, tied)
        self.read_positions, self.write_positions = Positions(embedding_size), Positions(embedding_size)
        self.read_widen, self.write_widen = (nn.Linear(embedding_size, hidden_size) for _ in range(2))
        self.readers = nn.ModuleList(Reader(hidden_size, kernel_size, dropout) for _ in range(layers))
        head_size = -(-hidden_size // heads)
        self.writers = nn.ModuleList(Writer(hidden_size, kernel_size, heads, head_size, dropout) for _ in range(layers))
        self.norm, self.dropout = nn.LayerNorm(hidden_size), nn.Dropout(dropout)

    def encode(self, encoded: Tensor, present: Tensor) -> Tensor:
        x = self.read_widen(self.read_positions(encoded))
        for reader in self.readers:
            x = reader(x, present)
        return x

    def begin(self, batch: int) -> Cache:
        written = torch.zeros(batch, 0, device=self.device)  # its width is the number of symbols written
        return (written, *empty_queues(self.writers, batch))

    def decode(self, encoded: Tensor, sources: list[Cache], present: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        start, queues = state[0].shape[1], []
        x = self.write_widen(self.write_positions(encoded, start))
        for writer, queue, source in zip(self.writers, state[1:], sources, strict=True):
            x, queue = writer(x, queue, source, present)
            queues.append(queue)
        return self.dropout(self.norm(x)), (F.pad(state[0], (0, encoded.shape[1])), *queues)
