"""What a sequence model is: one network with two views, whole sequences at once and one step at a time."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from unrecurrent.errors import InputError

Cache = tuple[Tensor, ...]


class Interface(NamedTuple):
    """What goes in and comes out: `vocabulary` symbols or `features` real numbers in, `outputs` numbers out.

    `separator` is the symbol between what is read and what is written, where a task has one.
    """

    vocabulary: int | None
    features: int | None
    outputs: int
    separator: int | None = None


class SequenceModel(nn.Module):
    """A causal model of sequences; subclasses give the body between an input encoder and a linear readout.

    `forward` maps `(B, T)` symbols or `(B, T, D)` features to `(B, T, outputs)`; `step` maps one input
    `(B,)` or `(B, D)` and a cache to one output `(B, outputs)` and the next cache. Both are `advance`, which
    reads any number of steps from a cache, so that they cannot disagree and a long stream can be read in pieces.
    `receptive_field` is the number of inputs an output can depend on (`None`: all of them).
    """

    recurrent: ClassVar[bool] = False
    #: the dimension of the parts of a cache along which the sequences of a batch lie
    cache_axis: ClassVar[int] = 0
    receptive_field: int | None = None

    def __init__(
        self,
        interface: Interface,
        encoded: int,
        hidden: int,
        dropout: float,
        input_dropout: float,
        tied: bool = False,
    ):
        super().__init__()
        self.interface = interface
        if interface.vocabulary is not None:
            self.embedding: nn.Embedding | None = nn.Embedding(interface.vocabulary, encoded)
            nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        else:
            self.embedding = None
        self.input_dropout = nn.Dropout(input_dropout)
        self.output_dropout = nn.Dropout(dropout)
        narrowed = tied and hidden != encoded
        self.narrow: nn.Module = nn.Linear(hidden, encoded, bias=False) if narrowed else nn.Identity()
        self.readout = nn.Linear(encoded if tied else hidden, interface.outputs)
        if tied:
            self._tie()

    def _tie(self) -> None:
        """Read words out by the table they are read in by (Press and Wolf 2017, arXiv:1608.05859)."""
        if self.embedding is None or self.interface.outputs != self.interface.vocabulary:
            raise InputError("tied needs a task that reads and predicts the same symbols: leave it out")
        self.readout.weight = self.embedding.weight
        nn.init.zeros_(self.readout.bias)

    @property
    def device(self) -> torch.device:
        return self.readout.weight.device

    def init_cache(self, batch: int) -> Cache:
        """Return what a model that has read nothing remembers, for `batch` sequences."""
        raise NotImplementedError

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        """Return the cache of the given sequences of the batch, in that order; a row may come more than once."""
        return tuple(part.index_select(self.cache_axis, rows) for part in cache)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read encoded inputs `(B, T, E)` from `cache`; return hidden features `(B, T, H)` and the next cache."""
        raise NotImplementedError

    def advance_hidden(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read `T` more inputs from `cache`; return what `readout` reads, `(B, T, H)`, and the next cache."""
        hidden, cache = self.advance_body(self.embedded(inputs), cache)
        return self.to_readout(hidden), cache

    def embedded(self, inputs: Tensor) -> Tensor:
        """Return what the body reads, `(B, T, E)`."""
        return self.input_dropout(inputs if self.embedding is None else self.embedding(inputs))

    def to_readout(self, hidden: Tensor) -> Tensor:
        """Return what `readout` reads for hidden features of the body."""
        return self.output_dropout(self.narrow(hidden))

    def forward_hidden(self, inputs: Tensor) -> Tensor:
        """Return what `readout` reads, `(B, T, H)`, for whole sequences."""
        return self.advance_hidden(inputs, self.init_cache(inputs.shape[0]))[0]

    def advance(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Read `T` more inputs from `cache`; return the `T` outputs and the next cache."""
        hidden, cache = self.advance_hidden(inputs, cache)
        return self.readout(hidden), cache

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs `(B, T, outputs)` for whole sequences `(B, T)` or `(B, T, D)`."""
        return self.readout(self.forward_hidden(inputs))

    def step(self, inputs: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """Return the output `(B, outputs)` for one more input `(B,)` or `(B, D)`, and the next cache."""
        outputs, cache = self.advance(inputs.unsqueeze(1), cache)
        return outputs.squeeze(1), cache

    def settle(self) -> None:
        """Make true what `project` holds only roughly, before weights are scored and kept; most models do nothing."""

    def project(self) -> None:
        """Return to the constraint set after an optimizer step; models without a constraint do nothing."""


def encoded_size(interface: Interface, embedding_size: int) -> int:
    """Return the width the body reads: the embedding's for symbols, the number of features otherwise."""
    return embedding_size if interface.vocabulary is not None else int(interface.features or 0)


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


Settings = dict[str, Any]
