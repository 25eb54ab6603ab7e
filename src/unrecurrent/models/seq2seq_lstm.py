"""The models `seq2seq-lstm`, `stable-seq2seq-lstm`, `certified-seq2seq-lstm`: LSTMs that attend to the source.

After Sutskever, Vinyals and Le (2014, arXiv:1409.3215) and Bahdanau, Cho and Bengio (2015, arXiv:1409.0473). As in
Wu et al. (2016, arXiv:1609.08144) the first layer of the decoder asks, and the second reads the answer: the recurrence
does not run through the attention: where each layer contracts, what was written is forgotten at the rate of the
slowest. (How much a layer passes on to the next is not bounded: each has a horizon over its own inputs, all have none.)
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unrecurrent.certificate import Certificate, certify
from unrecurrent.models.bounded import BoundedInputs
from unrecurrent.models.certified import RATE
from unrecurrent.models.seq2seq import CrossAttention, Seq2Seq
from unrecurrent.models.sequence_model import Cache, Interface
from unrecurrent.models.stable import EMBEDDING_BOUND
from unrecurrent.stability import StableLSTM, stabilize


class Seq2SeqLSTM(Seq2Seq):
    """A bidirectional LSTM reads; an LSTM, attention, and an LSTM over both write."""

    recurrent = True
    layer_class: ClassVar[type[nn.Module]] = nn.LSTM

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 256,
        heads: int = 4,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 256,
        tied: bool = False,
    ):
        super().__init__(interface, embedding_size, hidden_size, input_dropout, tied)
        self.hidden_size = hidden_size
        half = -(-hidden_size // 2)
        self.readers = nn.ModuleList(self._layer(embedding_size, half) for _ in range(2))
        self.asker = self._layer(embedding_size, hidden_size)
        self.attention = CrossAttention(hidden_size, 2 * half, heads, -(-hidden_size // heads))
        self.writer = self._layer(2 * hidden_size, hidden_size)
        self.join = nn.Linear(2 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def layer_options(self) -> dict[str, Any]:
        """Return what the layers take besides sizes."""
        return {}

    def _layer(self, inputs: int, hidden: int) -> nn.Module:
        return self.layer_class(inputs, hidden, batch_first=True, **self.layer_options())

    def layer_certificates(self, method: str = "best") -> dict[str, Certificate]:
        """Return what is proved of each layer, for all inputs it can have: those who read, who asks, and who writes."""
        return {name: certify(layer, method=method) for name, layer in self._layers().items()}

    def _layers(self) -> dict[str, nn.Module]:
        forth, back = self.readers
        return {"reader": forth, "reader backwards": back, "asker": self.asker, "writer": self.writer}

    def encode(self, encoded: Tensor, present: Tensor) -> Tensor:
        forth, back = self.readers
        turned = _turned(encoded, present)
        return self.dropout(torch.cat([forth(encoded)[0], _turned(back(turned)[0], present)], -1))

    def begin(self, batch: int) -> Cache:
        return (self.readout.weight.new_zeros(batch, self.hidden_size),) * 4

    def decode(self, encoded: Tensor, sources: list[Cache], present: Tensor, state: Cache) -> tuple[Tensor, Cache]:
        asked, first = _run(self.asker, encoded, state[:2])
        asked = self.dropout(asked)
        answered = self.attention(asked, sources[0], present)
        written, second = _run(self.writer, torch.cat([asked, answered], -1), state[2:])
        joined = self.join(torch.cat([self.dropout(written), answered], -1)).tanh()
        return self.dropout(joined), (*first, *second)


def _run(layer: nn.Module, x: Tensor, state: Cache) -> tuple[Tensor, Cache]:
    """Run a layer from a state `(B, H)` of each part; return its outputs and such a state."""
    y, after = layer(x, tuple(part[None] for part in state))
    return y, tuple(part[0] for part in after)


def _turned(x: Tensor, present: Tensor) -> Tensor:
    """Return rows `(B, M, D)` with what is present in reverse order, what is not left behind it.

    >>> _turned(torch.tensor([[[1], [2], [0]]]), torch.tensor([[True, True, False]])).flatten().tolist()
    [2, 1, 0]
    """
    places = torch.arange(x.shape[1], device=x.device)
    lengths = present.sum(1, keepdim=True)
    places = torch.where(places < lengths, lengths - 1 - places, places)
    return x.gather(1, places[..., None].expand_as(x))


class StableSeq2SeqLSTM(BoundedInputs, Seq2SeqLSTM):
    """The same with every layer under the conditions of Miller and Hardt (2019), for inputs bounded entry by entry.

    What the second layer of the decoder reads, hidden states and the answer of the attention, is clipped to the bound.
    """

    def __init__(self, interface: Interface, **settings: Any):
        super().__init__(interface, **settings)
        self.input_bound = EMBEDDING_BOUND
        self.writer.register_forward_pre_hook(_Clip(EMBEDDING_BOUND))
        self.project()

    def project(self) -> None:
        self.clip_embedding()
        for layer in self._layers().values():
            stabilize(layer, method="miller-hardt", input_bound=self.input_bound)

    def layer_certificates(self, method: str = "best") -> dict[str, Certificate]:
        bound = self.input_bound
        return {name: certify(each, input_bound=bound, method=method) for name, each in self._layers().items()}


class _Clip:
    """Clips what a layer is called with: a class of its own, so that the model can be copied and pickled."""

    def __init__(self, bound: float):
        self.bound = bound

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0].clamp(-self.bound, self.bound), *arguments[1:])


class CertifiedSeq2SeqLSTM(Seq2SeqLSTM):
    """The same of layers that contract at `rate`, whatever they read."""

    layer_class = StableLSTM

    def __init__(self, interface: Interface, rate: float = RATE, **settings: Any):
        self.rate = rate
        super().__init__(interface, **settings)

    def layer_options(self) -> dict[str, Any]:
        return {"rate": self.rate}
