"""A module and inputs for which an uncertain start state matters late: the next steps read what the last ones kept."""

import torch
from torch import nn


class LooksLate(nn.Module):
    """Two states that are kept as long as the fourth input says; the output is their difference times the third."""

    def forward(self, x, hx=None):
        h = x.new_zeros(1, x.shape[1], 2) if hx is None else hx
        outputs = []
        for step in x:
            h = step[:, 3:4] * h + step[:, :2]
            outputs.append(step[:, 2:3] * (h[0, :, :1] - h[0, :, 1:]))
        return torch.stack(outputs), h


def late_inputs(steps, second, generator=None):
    """Return inputs whose states before step `second` are kept, and looked at five steps later."""
    x = torch.rand(steps, 1, 4, dtype=torch.float64, generator=generator)
    x[..., 1] *= 0.2
    x[..., 2], x[..., 3] = 0, 0.9
    x[second - 250 : second, :, 3], x[second - 250 : second, :, :2] = 1, 0
    x[second + 5, :, 2] = 1_000
    return x
