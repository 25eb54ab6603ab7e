"""The parallel scan of minGRU against one step after the other, outputs and gradients, at odd lengths."""

import pytest
import torch

from unrecurrent.models.mingru import scan, scan_reference


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64, 101])
def test_the_scan_is_the_loop(steps):
    generator = torch.Generator().manual_seed(steps)
    keep = torch.rand(3, steps, 5, generator=generator, dtype=torch.float64)
    keep[:, steps // 2] = 0.0  # a gate that forgets all: nothing may be divided by it
    add, start = (torch.randn(3, *n, 5, generator=generator, dtype=torch.float64) for n in ((steps,), ()))
    leaves = [t.requires_grad_() for t in (keep, add, start)]
    weights = torch.randn(3, steps, 5, generator=generator, dtype=torch.float64)
    fast, plain = scan(*leaves), scan_reference(*leaves)
    torch.testing.assert_close(fast, plain)
    slopes = (torch.autograd.grad((out * weights).sum(), leaves) for out in (fast, plain))
    torch.testing.assert_close(*slopes)
