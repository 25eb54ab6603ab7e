"""What the sequence-to-sequence models share: read a source, then write its translation while attending to it."""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.errors import InputError
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel


class CrossAttention(nn.Module):
    """Heads of attention from what is written to what was read, `A · concat_h softmax(q kᵀ / √d) v`.

    (Bahdanau, Cho and Bengio 2015, arXiv:1409.0473; in heads: Vaswani et al. 2017, arXiv:1706.03762.)
    """

    def __init__(self, width: int, memory: int, heads: int, head_size: int):
        super().__init__()
        self.heads, self.head_size = heads, head_size
        self.ask = nn.Linear(width, heads * head_size)
        self.offer = nn.Linear(memory, 2 * heads * head_size)
        self.outward = nn.Linear(heads * head_size, width)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

    def remember(self, memory: Tensor) -> Cache:
        """Return keys and values `(B, heads, M, d)` of what was read, `(B, M, E)`."""
        keys, values = self.offer(memory).chunk(2, -1)
        return self._split(keys), self._split(values)

    def forward(self, x: Tensor, remembered: Cache, present: Tensor) -> Tensor:
        """Return `(B, T, H)` for queries `(B, T, H)`; `present` `(B, M)` says which positions were read."""
        keys, values = remembered
        mixed = F.scaled_dot_product_attention(self._split(self.ask(x)), keys, values, present[:, None, None])
        return self.outward(mixed.transpose(1, 2).flatten(2))


class Seq2Seq(SequenceModel):
    """Reads symbols up to the task's separator, then predicts what follows it, with the whole source in view.

    Its outputs before the separator say nothing (they are zeros before the readout). The cache holds the symbols read
    until the separator comes; from then on `(present, *remembered, *state)`: which positions were read, the keys and
    values of each attention, and the decoder's state. A batch may be read in pieces, or step by step, as long as the
    separator stands at the same place in all its sequences; in one piece it may stand anywhere.
    """

    def __init__(self, interface: Interface, embedding_size: int, hidden: int, input_dropout: float, tied: bool):
        if interface.vocabulary is None or interface.separator is None:
            raise InputError(
                "a sequence-to-sequence model needs a task of pairs, such as multi30k: take lstm or transformer here"
            )
        super().__init__(interface, embedding_size, hidden, 0.0, input_dropout, tied)
        self.separator = interface.separator

    def attentions(self) -> list[CrossAttention]:
        """Return the attentions to the source, in the order in which they were made and are asked."""
        return [part for part in self.modules() if isinstance(part, CrossAttention)]

    @abstractmethod
    def encode(self, encoded: Tensor, present: Tensor) -> Tensor:
        """Return the memory `(B, M, E)` of a source `(B, M, D)`; `present` `(B, M)` says which positions are there."""

    @abstractmethod
    def begin(self, batch: int) -> Cache:
        """Return the state of a decoder that has written nothing."""

    @abstractmethod
    def decode(self, encoded: Tensor, sources: list[Cache], present: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        """Read what was written, `(B, T, D)`, from `state`; return features `(B, T, H)` and the next state."""

    def init_cache(self, batch: int) -> Cache:
        return (torch.zeros(batch, 0, dtype=torch.int64, device=self.device),)

    def advance_hidden(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        if not cache:
            raise InputError(
                "the sequences of this batch have their separators at different places: read them on one by one"
            )
        if len(cache) > 1:
            return self._write(inputs, cache)
        source = torch.cat([cache[0], inputs], 1)
        begun = (inputs == self.separator).cumsum(1) > 0
        steps = begun.sum(1)
        if not bool(steps.any()):
            return self._silence(inputs, inputs.shape[1]), (source,)
        lengths = source.shape[1] - (steps - 1).clamp_min(0)  # the separator is the last symbol read
        present = torch.arange(int(lengths.max()), device=source.device) < lengths[:, None]
        memory = self.encode(self.embedded(source[:, : present.shape[1]]), present)
        remembered = [part for attention in self.attentions() for part in attention.remember(memory)]
        hidden, after = self._write(_shifted(inputs, steps), (present, *remembered, *self.begin(len(inputs))))
        if bool((steps == steps[0]).all()):
            return torch.cat([self._silence(inputs, inputs.shape[1] - hidden.shape[1]), hidden], 1), after
        return _placed(hidden, begun), ()

    def _silence(self, inputs: Tensor, steps: int) -> Tensor:
        """Return what stands for the features of so many steps before the separator."""
        return self.readout.weight.new_zeros(len(inputs), steps, self.readout.in_features)

    def _write(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        present, rest = cache[0], cache[1:]
        count = 2 * len(self.attentions())
        sources = [rest[i : i + 2] for i in range(0, count, 2)]
        hidden, state = self.decode(self.embedded(inputs), sources, present, rest[count:])
        return self.narrow(hidden), (*cache[: 1 + count], *state)


def _shifted(inputs: Tensor, steps: Tensor) -> Tensor:
    """Return the last `steps` symbols of each row, moved to its start; what follows them counts for nothing.

    >>> _shifted(torch.tensor([[5, 1, 6, 7], [5, 8, 9, 1]]), torch.tensor([3, 1]))
    tensor([[1, 6, 7],
            [1, 1, 1]])
    """
    places = torch.arange(int(steps.max()), device=inputs.device) + (inputs.shape[1] - steps)[:, None]
    return inputs.gather(1, places.clamp_max(inputs.shape[1] - 1))


def _placed(hidden: Tensor, begun: Tensor) -> Tensor:
    """Return features `(B, N, H)` moved back to the steps that are `begun` `(B, T)`, zeros before them."""
    places = (begun.cumsum(1) - 1).clamp_min(0)
    return hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1])) * begun[..., None]
