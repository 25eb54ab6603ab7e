"""The recurrent models `rnn`, `lstm` and `gru`: torch's own layers with their fused kernels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.certificate import Certificate, certify, check_points, checked_bound
from unrecurrent.errors import InputError
from unrecurrent.models.causal_conv import CausalConv1d
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size

#: what a leaky unit starts with of its own state, a step: a memory of 20 steps
LEAK = 0.95
#: what a projected state is multiplied by at the start
GAIN = 4.0


class GatedInputs(nn.Module):
    """`x + glu(K ∗ x)`: a short causal convolution that shows each input together with the ones before it."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__()
        self.convolution = CausalConv1d(width, 2 * width, kernel_size, normed=False)

    def forward(self, x: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """Read `(B, T, D)` after `queue`; return `(B, T, D)` and the next queue."""
        gated, queue = self.convolution(x.transpose(1, 2), queue)
        return x + F.glu(gated, 1).transpose(1, 2), queue

    def bound(self, input_bound: float) -> float:
        """Return what no entry of the output exceeds where none of the inputs exceeds `input_bound`: a gate is ≤ 1."""
        read, _ = self.convolution.weight.detach().double().abs().sum((1, 2)).chunk(2)
        added, _ = self.convolution.bias.detach().double().abs().chunk(2)
        return input_bound + float((read * input_bound + added).max())


class RecurrentModel(SequenceModel):
    """Encoder, a stack of torch recurrent layers, linear readout.

    With `input_kernel` above 1 the layers read their inputs through a gated causal convolution of that size, so that
    the recurrence is not asked to do what a few past inputs can.
    """

    recurrent = True
    layer_class: ClassVar[type[nn.Module]]
    #: how many tensors the state of the layers is
    state_parts: ClassVar[int] = 1

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 200,
        layers: int = 1,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
        input_kernel: int = 1,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, dropout, input_dropout, tied)
        self.hidden_size, self.layers = hidden_size, layers
        self.front = GatedInputs(width, input_kernel) if input_kernel > 1 else None
        between = dropout if layers > 1 else 0.0
        self.recurrence = self.layer_class(
            width, hidden_size, layers, batch_first=True, dropout=between, **self.layer_options()
        )

    def layer_options(self) -> dict[str, Any]:
        """Return what the layers take besides sizes and dropout."""
        return {}

    def init_cache(self, batch: int) -> Cache:
        zero = self.readout.weight.new_zeros(self.layers, batch, self.hidden_size)
        queues = () if self.front is None else (self.front.convolution.queue(batch),)
        return (zero,) * self.state_parts + queues

    def select(self, cache: Cache, rows: Tensor) -> Cache:
        state = tuple(part.index_select(1, rows) for part in cache[: self.state_parts])
        return state + super().select(cache[self.state_parts :], rows)

    @property
    def reach(self) -> int:
        """For how many more steps an input of the model is part of what the layers read."""
        return 0 if self.front is None else self.front.convolution.reach

    def layer_inputs(self, encoded: Tensor, queues: Cache) -> tuple[Tensor, Cache]:
        """Return what the layers read of encoded inputs `(B, T, E)`, as wide, and the queues after them."""
        if self.front is None:
            return encoded, ()
        encoded, queue = self.front(encoded, *queues)
        return encoded, (queue,)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        state, queues = cache[: self.state_parts], cache[self.state_parts :]
        encoded, queues = self.layer_inputs(encoded, queues)
        hidden, after = self.recurrence(encoded, state if self.state_parts > 1 else state[0])
        return hidden, (*(after if self.state_parts > 1 else (after,)), *queues)

    def certificate(
        self, inputs: Sequence[Tensor] | None = None, input_bound: float | None = None, method: str = "best"
    ) -> Certificate:
        """Return what can be proved about the recurrence in evaluation mode, said of what its layers read.

        A model of symbols is certified for its embedding table, which is every input there is, or behind a convolution
        for all inputs. One of features: for what its layers read of the sequences `inputs`, each `(T, D)`, or of any
        with no entry above `input_bound`; with neither, for all inputs.
        """
        if self.embedding is not None:
            if inputs is not None or input_bound is not None:
                raise InputError(
                    "a model of symbols is certified for all there are: leave the data and the bound of the inputs out"
                )
            return certify(self.recurrence, embedding=self.embedding if self.front is None else None, method=method)
        if self.front is not None and input_bound is not None:
            input_bound = self.front.bound(checked_bound(input_bound))
        seen = None if inputs is None else self._seen(list(inputs))
        return certify(self.recurrence, inputs=seen, input_bound=input_bound, method=method)

    @torch.no_grad()
    def _seen(self, sequences: list[Tensor]) -> Tensor:
        """Return all that the layers read of some sequences of features in evaluation mode, `(N, D)`."""
        for features in sequences:
            check_points(features, int(self.interface.features or 0), "inputs")
            if features.dim() != 2:
                raise InputError("inputs must be a list of sequences (steps, features)")
        if not sequences:
            raise InputError("inputs is empty: give at least one sequence")
        if self.front is None:
            sequences = [torch.cat(sequences)]
        queues = self.init_cache(1)[self.state_parts :]
        self.training, was = False, self.training
        try:
            read = [self.layer_inputs(features[None].to(self.readout.weight), queues)[0] for features in sequences]
        finally:
            self.training = was
        return torch.cat(read, 1)[0]


class RNN(RecurrentModel):
    """The tanh RNN, `h_t = tanh(W h_{t-1} + U x_t + b)`.

    `leaky_units`, a share of the units of every layer, start as leaky sums of what drives them, with 0.95 of
    themselves a step and nothing of the other units (Le, Jaitly and Hinton 2015, arXiv:1504.00941, start all of a ReLU
    layer from the identity). They hold what was read tens of steps ago before anything is learnt. `projected`: the
    readout reads the state through a matrix that starts as 4 I, repeated where its sides differ, so that it reads every
    unit. Predictions can then be sharp while the state stays small, where the slope of tanh is close to 1 and a
    contracting W forgets no faster than its norm says.
    """

    layer_class: ClassVar[type[nn.Module]] = nn.RNN

    def __init__(self, interface: Interface, leaky_units: float = 0.0, projected: bool = False, **settings: Any):
        super().__init__(interface, **settings)
        if projected:
            self.narrow = nn.Linear(self.hidden_size, self.readout.in_features, bias=False)
            _start_projection(self.narrow.weight)
        leaky = round(leaky_units * self.hidden_size)
        for number in range(self.layers if leaky else 0):
            _start_leaky(getattr(self.recurrence, f"weight_hh_l{number}"), leaky)


@torch.no_grad()
def _start_projection(weight: Tensor) -> None:
    """Set weights to 4 I, repeated along the longer side."""
    outputs, units = (torch.arange(size) for size in weight.shape)
    weight.copy_(GAIN * (outputs[:, None] % len(units) == units % len(outputs)))


@torch.no_grad()
def _start_leaky(weight: Tensor, count: int) -> None:
    """Let the first `count` units of `(H, H)` weights keep themselves, and part them from the rest."""
    weight[:count] = LEAK * torch.eye(count, len(weight)).to(weight)
    weight[count:, :count] = 0


class GRU(RecurrentModel):
    """The gated recurrent unit in torch's form, with the reset gate after the product."""

    layer_class: ClassVar[type[nn.Module]] = nn.GRU


class LSTM(RecurrentModel):
    """The long short-term memory in torch's form."""

    layer_class: ClassVar[type[nn.Module]] = nn.LSTM
    state_parts = 2
