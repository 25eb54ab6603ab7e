"""The model `seq2seq-transformer`: attention that reads, and causal attention that writes (Vaswani et al. 2017).

The encoder is torch's own; the decoder is that of `transformer`, whose cache torch's has not, with attention to the
source in each block. Positions enter the encoder as learnt embeddings and the decoder as rotations.
"""

from torch import Tensor, nn

from unrecurrent.errors import InputError
from unrecurrent.models.seq2seq import CrossAttention, Seq2Seq
from unrecurrent.models.seq2seq_conv import Positions
from unrecurrent.models.sequence_model import Cache, Interface
from unrecurrent.models.transformer import Attention, Block, empty_attentions, rotations


class WritingBlock(nn.Module):
    """`x ← x + cross(norm(x))` after the self-attention of a block, before its perceptron."""

    def __init__(self, width: int, heads: int, head_size: int, dropout: float):
        super().__init__()
        self.block = Block(width, Attention(width, heads, head_size, None), dropout)
        self.before_source = nn.LayerNorm(width)
        self.source = CrossAttention(width, width, heads, head_size)

    def forward(
        self, x: Tensor, cache: Cache, rotation: Tensor, source: Cache, present: Tensor
    ) -> tuple[Tensor, Cache]:
        x, cache = self.block.attend(x, cache, rotation)
        x = x + self.block.dropout(self.source(self.before_source(x), source, present))
        return self.block.think(x), cache


class Seq2SeqTransformer(Seq2Seq):
    """`layers` blocks of torch's Transformer encoder read, as many blocks with attention to the source write."""

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 128,
        layers: int = 3,
        heads: int = 4,
        head_size: int = 32,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 256,
        tied: bool = False,
    ):
        if head_size % 2:
            raise InputError(f"head_size must be even, since positions rotate pairs of numbers, not {head_size}")
        super().__init__(interface, embedding_size, hidden_size, input_dropout, tied)
        self.head_size = head_size
        self.scale = embedding_size**0.5  # as in the paper (3.4): what a word is must weigh more than where it stands
        self.positions = Positions(embedding_size)
        # The width of torch's encoder is a multiple of its heads, as that of its attention is one of theirs.
        inner = heads * head_size
        self.read_widen, self.write_widen = nn.Linear(embedding_size, inner), nn.Linear(embedding_size, hidden_size)
        layer = nn.TransformerEncoderLayer(
            inner, heads, 4 * hidden_size, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.reader = nn.TransformerEncoder(layer, layers, nn.LayerNorm(inner), enable_nested_tensor=False)
        self.read_narrow = nn.Linear(inner, hidden_size)
        self.writers = nn.ModuleList(WritingBlock(hidden_size, heads, head_size, dropout) for _ in range(layers))
        self.norm, self.dropout = nn.LayerNorm(hidden_size), nn.Dropout(dropout)

    def encode(self, encoded: Tensor, present: Tensor) -> Tensor:
        x = self.read_widen(self.positions(self.scale * encoded))
        return self.read_narrow(self.reader(x, src_key_padding_mask=~present))

    def begin(self, batch: int) -> Cache:
        return empty_attentions(self, batch)

    def decode(self, encoded: Tensor, sources: list[Cache], present: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        x = self.write_widen(self.scale * encoded)
        rotation = rotations(state[0].shape[-2] + x.shape[1], self.head_size, x)
        after: list[Tensor] = []
        for i, (writer, source) in enumerate(zip(self.writers, sources, strict=True)):
            x, kept = writer(x, state[2 * i : 2 * i + 2], rotation, source, present)
            after.extend(kept)
        return self.dropout(self.norm(x)), tuple(after)
