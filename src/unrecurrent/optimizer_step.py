"""One step of a training: gradients, clipped, and the optimizer; those of large tables row by row."""

import torch
from torch import Tensor


class OptimizerStep:
    """Goes back from a loss, clips the norm of all gradients and takes one step of an optimizer.

    A step over sampled words reaches a few thousand rows of a table of tens of thousands. Where a gradient is sparse,
    only its rows are added up and clipped; the optimizer, which moves every row, finds them in a table of zeros that is
    kept from step to step. The result is that of dense gradients, for optimizers that do not write to them (those of
    `make_optimizer`; Nesterov momentum in torch's foreach form does).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip_norm: float):
        self.optimizer, self.clip_norm = optimizer, clip_norm
        self.tables: dict[Tensor, Tensor] = {}

    def __call__(self, loss: Tensor) -> None:
        rows: dict[Tensor, Tensor] = {}
        try:
            loss.backward()
            trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            rows = {p: p.grad.coalesce() for p in trained if p.grad.is_sparse}
            clipped = [_holder(rows[p].values()) if p in rows else p for p in trained]
            torch.nn.utils.clip_grad_norm_(clipped, self.clip_norm)
            for parameter, gradient in rows.items():
                parameter.grad = self._table(parameter).index_copy_(0, gradient.indices()[0], gradient.values())
            self.optimizer.step()
        finally:  # nothing of a step that was interrupted may be found by the next one
            for parameter, gradient in rows.items():
                self._table(parameter).index_fill_(0, gradient.indices()[0], 0)
            # Now rather than before the next way back: the pass that leads there has the memory.
            self.optimizer.zero_grad(set_to_none=True)

    def _table(self, parameter: Tensor) -> Tensor:
        if parameter not in self.tables:
            self.tables[parameter] = torch.zeros_like(parameter)
        return self.tables[parameter]


def _holder(gradient: Tensor) -> Tensor:
    """Return a tensor that has this gradient, for functions that ask for parameters."""
    holder = gradient.detach()
    holder.grad = gradient
    return holder
