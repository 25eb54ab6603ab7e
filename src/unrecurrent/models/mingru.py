"""The model `mingru`: the minimal gated unit of "Were RNNs all we needed?" (Feng et al. 2024, arXiv:2410.01201)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel, encoded_size


def scan_reference(keep: Tensor, add: Tensor, start: Tensor) -> Tensor:
    """Return `h_t = keep_t h_{t−1} + add_t` for all t, `(B, T, H)`, one step after the other from `start` `(B, H)`."""
    states, state = [], start
    for t in range(keep.shape[1]):
        state = keep[:, t] * state + add[:, t]
        states.append(state)
    return torch.stack(states, 1)


def scan(keep: Tensor, add: Tensor, start: Tensor) -> Tensor:
    """Return the same in ⌈log₂ T⌉ passes over all steps at once (Hillis and Steele 1986).

    After a pass at distance d, `keep_t` and `add_t` hold the effect of the last 2d steps; nothing is divided, so that
    gates near 0 do no harm.
    """
    add = torch.cat([(keep[:, :1] * start[:, None] + add[:, :1]), add[:, 1:]], 1)
    distance, steps = 1, keep.shape[1]
    while distance < steps:
        behind = (0, 0, distance, 0)
        add = add + keep * F.pad(add[:, :-distance], behind)
        keep = keep * F.pad(keep[:, :-distance], behind, value=1.0)
        distance *= 2
    return add


class MinGRULayer(nn.Module):
    """`h_t = (1 − z_t) h_{t−1} + z_t tanh(U x_t + b)`, `z_t = σ(U_z x_t + b_z)`: gates that do not see the state.

    The candidate is squashed as in a GRU, which bounds the state by 1; the paper leaves it linear.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.drive = nn.Linear(inputs, 2 * hidden)

    def forward(self, x: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Read `(B, T, D)` from `start` `(B, H)`; return all states `(B, T, H)` and the last one."""
        gate, candidate = self.drive(x).chunk(2, -1)
        update = torch.sigmoid(gate)
        states = scan(1 - update, update * torch.tanh(candidate), start)
        return states, states[:, -1]


class MinGRU(SequenceModel):
    """A stack of minimal gated recurrent units with residual connections, trained and scored in parallel over time."""

    recurrent = True
    cache_axis = 1

    def __init__(
        self,
        interface: Interface,
        hidden_size: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        embedding_size: int = 64,
        tied: bool = False,
    ):
        width = encoded_size(interface, embedding_size)
        super().__init__(interface, width, hidden_size, dropout, input_dropout, tied)
        self.hidden_size = hidden_size
        self.layers = nn.ModuleList(MinGRULayer(width if i == 0 else hidden_size, hidden_size) for i in range(layers))
        self.between = nn.Dropout(dropout)

    def init_cache(self, batch: int) -> Cache:
        return (self.readout.weight.new_zeros(len(self.layers), batch, self.hidden_size),)

    def advance_body(self, encoded: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        x, lasts = encoded, []
        for number, layer in enumerate(self.layers):
            states, last = layer(self.between(x) if number else x, cache[0][number])
            x = states + x if states.shape == x.shape else states
            lasts.append(last)
        return x, (torch.stack(lasts),)
