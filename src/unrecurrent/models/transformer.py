"""The model `transformer`: causal self-attention (Vaswani et al. 2017, arXiv:1706.03762), normed before each part.

Positions enter as rotations of queries and keys (RoFormer, Su et al. 2021, arXiv:2104.09864), so that attention depends
on distances alone and a stream may be of any length.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.errors import InputError
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size

#: queries that attend together where there is a window: few, and there are many calls; many, and most of it is masked
BLOCK = 64


def attend_reference(queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Return `softmax(q kᵀ / √d) v` for queries `(…, T, d)` that come last among the keys `(…, M + T, d)`.

    A query sees itself and what came before it, with `window` no more than so many of these in all.
    """
    scores = queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    unseen = ~visible(queries.shape[-2], keys.shape[-2], window, queries.device)
    return scores.masked_fill(unseen, float("-inf")).softmax(-1) @ values


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which of the keys each of the last `queries` positions sees, `(queries, keys)`."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, window: int | None, block: int = BLOCK) -> Tensor:
    """Return the same by torch's fused kernels, with a window `block` queries at a time and the keys in their reach.

    Work and memory are then T times the window, and not T².
    """
    steps, behind = queries.shape[-2], keys.shape[-2] - queries.shape[-2]
    if (window is None or behind + steps <= window) and (behind == 0 or steps == 1):
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=steps > 1)
    sizes = [steps] if window is None else [min(block, steps - start) for start in range(0, steps, block)]
    # One split, its pieces joined again: slices would cost the backward pass a whole sequence of zeros each.
    blocks = [part.split([behind, *sizes], -2) for part in (keys, values)]
    outputs = []
    for i, some in enumerate(queries.split(sizes, -2), start=1):
        first = 0 if window is None else max(0, i - -(-(window - 1) // block))
        some_keys, some_values = (torch.cat(part[first : i + 1], -2) for part in blocks)
        mask = visible(some.shape[-2], some_keys.shape[-2], window, queries.device)
        outputs.append(F.scaled_dot_product_attention(some, some_keys, some_values, mask))
    return torch.cat(outputs, -2)


def rotations(count: int, size: int, like: Tensor) -> Tensor:
    """Return `e^{i t θ_j}`, `θ_j = 10000^{−2j/size}`, for positions t < count as (cos, sin), `(2, count, size / 2)`."""
    # In float64: far along, a float32 could not tell neighbouring positions apart by their angles.
    rates = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=like.device) / size)
    angles = torch.arange(count, dtype=torch.float64, device=like.device)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()]).to(like.dtype)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Return `x` `(…, T, d)` with its pairs of entries (j, j + d/2) rotated."""
    (cos, sin), (a, b) = rotation, x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nn.Module):
    """Heads of causal self-attention, `A · concat_h softmax((R q)(R k)ᵀ / √d) v` over the last `window` inputs.

    The cache holds keys, not yet rotated, and values `(B, heads, M, d)` of the last `window − 1` inputs, or of all.
    """

    def __init__(self, width: int, heads: int, head_size: int, window: int | None):
        super().__init__()
        self.heads, self.head_size, self.window = heads, head_size, window
        self.inward = nn.Linear(width, 3 * heads * head_size)
        self.outward = nn.Linear(heads * head_size, width)

    def empty(self, batch: int) -> Tensor:
        """Return the keys, and values, of one that has read nothing."""
        return self.outward.weight.new_zeros(batch, self.heads, 0, self.head_size)

    def forward(self, x: Tensor, cache: Cache, rotation: Tensor) -> tuple[Tensor, Cache]:
        """Read `(B, T, H)` after `cache`; return `(B, T, H)` and the next cache."""
        new = self.inward(x).unflatten(-1, (3, self.heads, self.head_size)).permute(2, 0, 3, 1, 4)
        keys, values = (torch.cat([old, part], -2) for old, part in zip(cache, new[1:], strict=True))
        queries = rotate(new[0], rotation[:, -x.shape[1] :])
        mixed = attend(queries, rotate(keys, rotation), values, self.window)
        forgotten = 0 if self.window is None else max(0, keys.shape[-2] - self.window + 1)
        kept = tuple(part[..., forgotten:, :] for part in (keys, values))
        return self.outward(mixed.transpose(1, 2).flatten(2)), kept


def empty_attentions(model: nn.Module, batch: int) -> Cache:
    """Return keys and values of each self-attention of a model that has read nothing, in the order they were made."""
    layers = [part for part in model.modules() if isinstance(part, Attention)]
    return tuple(part for layer in layers for part in 2 * [layer.empty(batch)])


class Block(nn.Module):
    """`x ← x + attention(norm(x))`, then `x ← x + W₂ gelu(W₁ norm(x))` (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, width: int, attention: Attention, dropout: float):
        super().__init__()
        self.before_attention, self.attention = nn.LayerNorm(width), attention
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def attend(self, x: Tensor, cache: Cache, rotation: Tensor) -> tuple[Tensor, Cache]:
        mixed, cache = self.attention(self.before_attention(x), cache, rotation)
        return x + self.dropout(mixed), cache

    def think(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.perceptron(x))

    def forward(self, x: Tensor, cache: Cache, rotation: Tensor) -> tuple[Tensor, Cache]:
        x, cache = self.attend(x, cache, rotation)
        return self.think(x), cache


class Transformer(SequenceModel):
    """Blocks of causal self-attention and a perceptron.

    With `window` a layer attends to the last so many inputs, itself included: the receptive field is
    `1 + layers (window − 1)`, and the cache, and so the cost of a step, stays bounded. Without it both grow with all
    that was read. The heads' width `head_size` does not depend on `hidden_size`, as in the paper's Table 3.
    """

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 64,
        layers: int = 2,
        heads: int = 4,
        head_size: int = 16,
        window: int | None = None,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        if head_size % 2:
            raise InputError(f"head_size must be even, since positions rotate pairs of numbers, not {head_size}")
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, 0.0, input_dropout, tied)
        self.head_size, self.window = head_size, window
        self.widen = nn.Linear(width, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, Attention(hidden_size, heads, head_size, window), dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.receptive_field = None if window is None else 1 + layers * (window - 1)

    def init_cache(self, batch: int) -> Cache:
        return empty_attentions(self, batch)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x = self.widen(encoded)
        # Positions count from the oldest key kept: only distances matter, and a long stream costs no precision.
        rotation = rotations(cache[0].shape[-2] + x.shape[1], self.head_size, x)
        after: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, cache[2 * i : 2 * i + 2], rotation)
            after.extend(kept)
        return self.norm(x), tuple(after)
