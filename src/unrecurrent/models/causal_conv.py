"""A causal convolution that can be read in pieces: what the feed-forward models are made of."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


class CausalConv1d(nn.Module):
    """A dilated convolution over time whose output at `t` sees the inputs `t, t − d, …, t − (K−1) d`.

    Its cache is the queue of the last `(K−1) d` inputs, zeros before the first one, which is zero padding.
    """

    def __init__(self, inputs: int, outputs: int, kernel_size: int, dilation: int = 1, normed: bool = True):
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation)
        self.conv = weight_norm(conv) if normed else conv
        self.inputs = inputs
        self.reach = (kernel_size - 1) * dilation

    def queue(self, batch: int) -> Tensor:
        return self.conv.weight.new_zeros(batch, self.inputs, self.reach)

    def forward(self, x: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
        """Read `(B, inputs, T)` after `queue`; return `(B, outputs, T)` and the next queue."""
        if self.reach == 0:
            return self.conv(x), queue
        seen = torch.cat([queue, x], dim=2)
        return self.conv(seen), seen[:, :, seen.shape[2] - self.reach :]
