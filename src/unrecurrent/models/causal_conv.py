"""A causal convolution that can be read in pieces: what the feed-forward models are made of."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unrecurrent.errors import InputError

#: a queue of inputs is kept for each sequence and convolution, so that none may be without end
MOST_REACH = 1 << 20


class CausalConv1d(nn.Module):
    """A dilated convolution over time whose output at `t` sees the inputs `t, t − d, …, t − (K−1) d`.

    With `normed` its weight is `g v / ‖v‖` with one gain `g` an output (weight normalisation, Salimans and Kingma
    2016, arXiv:1602.07868), kept as two ordinary parameters so that the module can be copied, pickled and exported.
    Its cache is the queue of the last `(K−1) d` inputs, zeros before the first one, which is zero padding.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int = 1, normed: bool = True):
        super().__init__()
        self.dilation = dilation
        self.reach = (kernel_size - 1) * dilation
        if self.reach > MOST_REACH:
            raise InputError(
                f"a convolution of kernel_size {kernel_size} with dilation {dilation:,} reaches {self.reach:,} inputs"
                f" back, more than {MOST_REACH:,}: choose fewer layers or a smaller kernel_size"
            )
        start = nn.Conv1d(inputs, outputs, kernel_size)
        assert start.bias is not None
        self.direction = nn.Parameter(start.weight.detach().clone())
        self.bias = nn.Parameter(start.bias.detach().clone())
        self.gain = nn.Parameter(self._norm().detach()) if normed else None

    def _norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.direction, dim=(1, 2), keepdim=True)

    @property
    def weight(self) -> Tensor:
        """The kernel `(outputs, inputs, K)`."""
        return self.direction if self.gain is None else self.direction * (self.gain / self._norm())

    def queue(self, batch: int) -> Tensor:
        """Return the queue of one that has read nothing."""
        return self.bias.new_zeros(batch, self.direction.shape[1], self.reach)

    def forward(self, x: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """Read `(B, inputs, T)` after `queue`; return `(B, outputs, T)` and the next queue."""
        seen = torch.cat([queue, x], dim=2) if self.reach else x
        outputs = F.conv1d(seen, self.weight, self.bias, dilation=self.dilation)
        return outputs, seen[:, :, seen.shape[2] - self.reach :]


def empty_queues(model: nn.Module, batch: int) -> tuple[Tensor, ...]:
    """Return the queue of each causal convolution of a model that has read nothing, in the order they were made."""
    return tuple(part.queue(batch) for part in model.modules() if isinstance(part, CausalConv1d))
