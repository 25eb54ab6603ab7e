"""Cross entropy over a large vocabulary that never holds all logits: exact, or from a sample of the words.

`cross_entropy_reference` is the plain form: all logits at once, in the precision of its arguments. The fast forms walk
over rows in chunks, make the gradients in the same pass, and may multiply in bfloat16, with sums and exponentials in
float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from unrecurrent.errors import InputError

#: logits a chunk of rows may hold at a time
CHUNK_NUMBERS = 1 << 24
#: rows and words of a tile of logits where no gradient is wanted
TILE = 1024
#: the power of a word's count its chance to be sampled goes with: flatter than the counts, for rare words push hard
POWER = 0.75


class WordSample(NamedTuple):
    """Sampled words `(K,)`, all different, and the logarithm `(K,)` of the chance each had to be among them."""

    words: Tensor
    log_chance: Tensor

    def to(self, device: torch.device) -> "WordSample":
        return WordSample(self.words.to(device), self.log_chance.to(device))


class WordSampler:
    """Draws words so that a weighted sum over them estimates the sum over all words without bias.

    Word j is drawn with probability `π_j = min(1, c n_j^0.75)`, n_j its count and c such that `Σ π_j = size`: frequent
    words always, so that their part of the sum is exact. Draws are systematic (Madow 1949, "On the theory of systematic
    sampling, II"): one uniform number u, and the words whose interval of length π_j holds u plus a whole number.

    >>> sampler = WordSampler(torch.tensor([100, 50, 4, 2, 2, 1]), 3)
    >>> round(float(sampler.chance.sum()), 6), sampler.draw().words[:2]
    (3.0, tensor([0, 1]))
    """

    def __init__(self, counts: Tensor, size: int):
        self.size = min(size, len(counts))
        self.chance = inclusion_chances(counts.double().clamp(min=1) ** POWER, self.size)
        self.ends = self.chance.cumsum(0)

    def draw(self) -> WordSample:
        """Return one sample of exactly `size` words, by torch's generator."""
        # A whole number of words is drawn only if rounding has not moved the end of the last interval.
        marks = (torch.arange(self.size, dtype=torch.double) + torch.rand((), dtype=torch.double)).clamp(
            max=float(self.ends[-1])
        )
        words = torch.searchsorted(self.ends, marks)
        return WordSample(words, self.chance[words].log().float())


def inclusion_chances(weights: Tensor, size: int) -> Tensor:
    """Return `min(1, c w_j)` with c such that they add up to `size`."""
    chance = torch.ones_like(weights)
    if size >= len(weights):
        return chance
    certain = torch.zeros(len(weights), dtype=torch.bool)
    while True:
        rest = ~certain
        scaled = weights * ((size - int(certain.sum())) / weights[rest].sum())
        more = rest & (scaled >= 1)
        if not bool(more.any()):
            return torch.where(certain, chance, scaled)
        certain |= more


def cross_entropy_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return `−log softmax(W h + b)_y` of every row, `(N,)`, from all logits at once."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")


def sampled_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, sample: WordSample
) -> Tensor:
    """Return the sampled form of the loss in plain operations: see `linear_cross_entropy`."""
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    others = F.linear(hidden, weight[sample.words], bias[sample.words] - sample.log_chance.to(weight))
    others = others.masked_fill(sample.words == targets[:, None], -torch.inf)
    own = (hidden * weight[targets]).sum(-1) + bias[targets]
    return torch.cat([others, own[:, None]], -1).logsumexp(-1) - own


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    sample: WordSample | None = None,
    dtype: torch.dtype | None = None,
    sparse: bool = False,
) -> Tensor:
    """Return the mean over rows of `−log p(y)`, `p = softmax(W h + b)`, with gradients.

    With a sample S the normaliser is estimated: `exp s_y + Σ_{j ∈ S, j ≠ y} exp(s_j) / π_j`, which is unbiased for
    any target (importance sampling of the normaliser: Bengio and Senécal 2003).

    Args:
        hidden: `(N, D)`.
        weight: `(V, D)`.
        bias: `(V,)` or `None`.
        targets: `(N,)` word numbers, from 0 to V − 1.
        sample: the words to normalise over (`None`: all, exactly).
        dtype: what products are made in (default: that of `hidden`); bfloat16 rounds a logit to 3 digits.
        sparse: with a sample, let the gradient of `weight` be a sparse tensor of the rows it reaches, as
            `nn.Embedding(sparse=True)` does.

    Raises:
        InputError: `sparse` without a sample: every row has a gradient then.

    >>> hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    >>> targets = torch.arange(5)
    >>> exact = cross_entropy_reference(hidden, weight, None, targets).mean()
    >>> bool(torch.isclose(linear_cross_entropy(hidden, weight, None, targets), exact))
    True
    """
    if sparse and sample is None:
        raise InputError("sparse needs a sample: without one every row of weight has a gradient")
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, sample, dtype or hidden.dtype, sparse)


@torch.no_grad()
def linear_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the exact `−log p(y)` of every row, `(N,)` in float32, without gradients; arguments as above.

    Logits are made in tiles that stay in the processor's cache, and each tile leaves the logarithm of its sum.
    """
    dtype = dtype or hidden.dtype
    rows, offset = weight.to(dtype), (weight.new_zeros(len(weight)) if bias is None else bias).to(dtype)
    parts = [hidden.new_zeros(0)]
    for h, y in zip(hidden.split(TILE), targets.split(TILE), strict=True):
        own, h_in = _own_logits(h, weight, bias, y), h.to(dtype)
        tiles = (
            _tile_of_others(h_in, rows[j : j + TILE], offset[j : j + TILE], y - j) for j in range(0, len(rows), TILE)
        )
        parts.append(torch.stack([own, *tiles]).logsumexp(0) - own)
    return torch.cat(parts)


def _own_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Return the logit of each row's target in full precision, `(N,)`."""
    own = (hidden * weight[targets]).sum(-1)
    return own if bias is None else own + bias[targets]


def _logits(hidden: Tensor, rows: Tensor, offset: Tensor | None) -> Tensor:
    """Return the logits of some words, `(N, K)`; in float32 where the product was made in bfloat16."""
    logits = F.linear(hidden, rows, offset)
    return logits.float() if logits.dtype == torch.bfloat16 else logits


def _tile_of_others(hidden: Tensor, rows: Tensor, offset: Tensor, place: Tensor) -> Tensor:
    """Return `log Σ exp` over the logits of some words, `(N,)`, without the target where it lies among them."""
    logits = _logits(hidden, rows, offset)
    hit = ((place >= 0) & (place < len(rows))).nonzero().squeeze(-1)
    logits[hit, place[hit]] = -torch.inf
    top = logits.amax(-1).clamp(min=torch.finfo(logits.dtype).min)  # no word but the target: the sum is 0, not NaN
    return logits.sub_(top[:, None]).exp_().sum(-1).log() + top


class _Exponentials(NamedTuple):
    """For a chunk of rows: losses, and the probabilities of the words beside the target and of the target."""

    losses: Tensor
    others: Tensor
    own: Tensor


class _Head:
    """The words that are normalised over, their rows of the weight in the dtype of the products."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sample: WordSample | None, dtype: torch.dtype):
        self.weight, self.bias, self.sample, self.dtype = weight, bias, sample, dtype
        self.rows = (weight if sample is None else weight[sample.words]).to(dtype)
        offset = None if bias is None else bias if sample is None else bias[sample.words]
        if sample is not None:
            log_chance = sample.log_chance.to(weight)
            offset = -log_chance if offset is None else offset - log_chance
        self.offset = None if offset is None else offset.to(dtype)
        #: where a target lies among the words (−1: it does not)
        self.place = torch.full((len(weight),), -1, device=weight.device)
        words = torch.arange(len(weight), device=weight.device) if sample is None else sample.words
        self.place[words] = torch.arange(len(words), device=weight.device)

    def chunks(self, hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = max(1, CHUNK_NUMBERS // len(self.rows))
        return list(zip(hidden.split(size), targets.split(size), strict=True))

    def exponentials(self, hidden: Tensor, targets: Tensor) -> _Exponentials:
        """Return losses and probabilities; the target's logit is made apart, in full precision, and counts once."""
        own = _own_logits(hidden, self.weight, self.bias, targets)
        logits = _logits(hidden.to(self.dtype), self.rows, self.offset)
        hit = self.place[targets]
        among = (hit >= 0).nonzero().squeeze(-1)
        logits[among, hit[among]] = -torch.inf
        top = torch.maximum(logits.amax(-1), own)
        others = logits.sub_(top[:, None]).exp_()
        own_exp = (own - top).exp()
        total = others.sum(-1) + own_exp
        share = 1 / total
        return _Exponentials(total.log() + top - own, others.mul_(share[:, None]), own_exp * share)


class _LinearCrossEntropy(torch.autograd.Function):
    """The mean loss; its gradients are made in the forward pass, when the probabilities are at hand."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        sample: WordSample | None,
        dtype: torch.dtype,
        sparse: bool,
    ) -> Tensor:
        head = _Head(weight, bias, sample, dtype)
        slope_rows = torch.zeros(len(head.rows), weight.shape[1], dtype=weight.dtype, device=weight.device)
        slope_offset = torch.zeros(len(head.rows), dtype=weight.dtype, device=weight.device)
        total, slopes_hidden, misses = hidden.new_zeros((), dtype=torch.double), [], []
        for h, y in head.chunks(hidden, targets):
            part = head.exponentials(h, y)
            total += part.losses.double().sum()
            # Slopes of the mean: dividing here spares a pass over a gradient as large as the vocabulary.
            others, miss = part.others.div_(len(hidden)).to(dtype), ((part.own - 1) / len(hidden)).to(hidden)
            slopes_hidden.append((others @ head.rows).to(hidden) + miss[:, None] * weight[y])
            slope_rows += others.T @ h.to(dtype)
            slope_offset += part.others.sum(0)
            misses.append(miss)
        miss, words = torch.cat(misses), None if sample is None else sample.words
        slope_weight = _of_all_words(words, slope_rows, targets, miss[:, None] * hidden, len(weight), sparse)
        slope_bias = _of_all_words(words, slope_offset, targets, miss.to(slope_offset), len(weight))
        ctx.has_bias = bias is not None
        ctx.save_for_backward(torch.cat(slopes_hidden), slope_weight, slope_bias)
        return (total / len(hidden)).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        if slope != 1:
            hidden, weight, bias = hidden * slope, weight * slope, bias * slope
        return hidden, weight, bias if ctx.has_bias else None, None, None, None, None


def _of_all_words(
    words: Tensor | None, slopes: Tensor, targets: Tensor, misses: Tensor, count: int, sparse: bool = False
) -> Tensor:
    """Return the slopes `(count, ...)` of all words: those of `words` (`None`: all), and what the targets add."""
    if words is None:
        return slopes.index_add_(0, targets, misses)
    size = (count, *slopes.shape[1:])
    if sparse:
        # Checking that every place is in the table would take as long as making it; words and targets are.
        places, values = torch.cat([words, targets]), torch.cat([slopes, misses])
        return torch.sparse_coo_tensor(places[None], values, size, check_invariants=False)
    return slopes.new_zeros(size).index_copy_(0, words, slopes).index_add_(0, targets, misses)
