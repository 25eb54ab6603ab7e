"""Batches: whole sequences padded to a common length, or a stream folded into columns and read in pieces."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from unrecurrent.tasks.task import Example

#: which steps of a sequence count (`None`: all)
Mask = Callable[[Example], Tensor | None]

#: a stream is scored in this many columns at most, none shorter than this many steps
MOST_COLUMNS, SHORTEST_COLUMN = 16, 2_048


@dataclass(frozen=True)
class Batch:
    """`inputs` and `targets` `(B, T, …)`; `mask` `(B, T)` is true where a step counts (`None`: everywhere).

    `fresh` says that the batch starts new sequences: a model that carries state starts it anew. `read` is the number of
    inputs that are no padding (`None`: as many as steps count).
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None
    fresh: bool
    read: int | None = None

    @property
    def tokens(self) -> int:
        """The number of inputs that are no padding."""
        return self.steps if self.read is None else self.read

    @property
    def steps(self) -> int:
        """The number of predicted steps that count."""
        return int(self.mask.sum()) if self.mask is not None else self.targets.shape[0] * self.targets.shape[1]

    def to(self, device: torch.device) -> "Batch":
        mask = self.mask.to(device) if self.mask is not None else None
        return Batch(self.inputs.to(device), self.targets.to(device), mask, self.fresh, self.read)


def padded(examples: Sequence[Example], mask_of: Mask = lambda example: None) -> Batch:
    """Return sequences of any lengths as one batch, zeros after the end of the shorter ones, which do not count.

    >>> first = padded([Example(torch.ones(2), torch.ones(2)), Example(torch.ones(3), torch.ones(3))])
    >>> first.mask.tolist(), first.steps
    ([[True, True, False], [True, True, True]], 5)
    """
    inputs = pad_sequence([e.inputs for e in examples], batch_first=True)
    targets = pad_sequence([e.targets for e in examples], batch_first=True)
    lengths = torch.tensor([len(e.inputs) for e in examples])
    mask = None
    if not bool((lengths == lengths[0]).all()):
        mask = torch.arange(inputs.shape[1]) < lengths[:, None]
    counting = [m for example in examples if (m := mask_of(example)) is not None]
    if counting:  # of a task that masks, every sequence has a mask
        mask = pad_sequence(counting, batch_first=True)
    return Batch(inputs, targets, mask, fresh=True, read=int(lengths.sum()))


def length_groups(lengths: Sequence[int], size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Return index groups of similar length, at most `size` each, in random order where a generator is given.

    Sequences of one length are shuffled among themselves first, so that groups differ from epoch to epoch
    while padding stays small.
    """
    count = len(lengths)
    order = torch.randperm(count, generator=generator).tolist() if generator else list(range(count))
    order.sort(key=lambda i: lengths[i])
    groups = [order[start : start + size] for start in range(0, count, size)]
    if generator:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return groups


def sequence_batches(
    examples: Sequence[Example],
    size: int,
    generator: torch.Generator | None = None,
    mask_of: Mask = lambda example: None,
) -> Iterator[Batch]:
    """Yield every sequence once, in batches of similar length."""
    for group in length_groups([len(e.inputs) for e in examples], size, generator):
        yield padded([examples[i] for i in group], mask_of)


def scoring_columns(steps: int) -> int:
    """Return the columns a stream of that many steps is scored in: at most 16, each long enough to have a past.

    >>> scoring_columns(500), scoring_columns(10_000), scoring_columns(400_000)
    (1, 4, 16)
    """
    return max(1, min(MOST_COLUMNS, steps // SHORTEST_COLUMN))


def stream_batches(example: Example, columns: int, piece: int, *, whole: bool) -> Iterator[Batch]:
    """Yield a long sequence as `columns` parallel columns, `piece` steps at a time, state carried between.

    With `whole` every step counts exactly once (the last column is padded); without it the few steps that do
    not fill a row are left out, as is usual in training.
    """
    steps = len(example.inputs)
    columns = max(1, min(columns, steps))
    height = -(-steps // columns) if whole else steps // columns
    inputs, counts = _fold(example.inputs, columns, height)
    targets, _ = _fold(example.targets, columns, height)
    for start in range(0, height, piece):
        part = slice(start, start + piece)
        mask = None if bool(counts[:, part].all()) else counts[:, part]
        yield Batch(_wide(inputs[:, part]), _wide(targets[:, part]), mask, fresh=start == 0)


def _wide(part: Tensor) -> Tensor:
    """Return symbols as the 64-bit numbers that losses want; large streams are kept in 32 bits."""
    return part if part.is_floating_point() else part.long()


def _fold(sequence: Tensor, columns: int, height: int) -> tuple[Tensor, Tensor]:
    total = columns * height
    kept = sequence[:total]
    missing = total - len(kept)
    if missing:
        kept = torch.cat([kept, kept.new_zeros(missing, *kept.shape[1:])])
    counts = (torch.arange(total) < total - missing).view(columns, height)
    return kept.view(columns, height, *sequence.shape[1:]), counts
