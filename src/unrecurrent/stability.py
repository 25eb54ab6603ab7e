"""Keep a recurrent layer stable while it is trained: `stabilize` and the drop-in layers that do it by themselves."""

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unrecurrent.errors import InputError
from unrecurrent.projections import clip_singular_values_, project_rows_

# Miller & Hardt, "Stable recurrent models", ICLR 2019, section 4 and appendix: the forget gate's pre-activation is at
# most 0.128 + 0.75 · 0.25 + 0.25 = 0.5655, so that F = σ(0.5655) < 0.64 and 1 − F > 0.36, (1 − F)² > 0.128.
PAPER_INPUT_BOUND = 0.75
PAPER_FORGET_DRIVE = 0.75 * 0.25
PAPER_FORGET_BIAS = 0.25
PAPER_FORGET_ROWS = 0.128
PAPER_GATE_ROWS = 0.36
PAPER_CANDIDATE_ROWS = 0.09
# The paper asks for a spectral norm below 1; at exactly 1 there is no rate, so stay this far below.
PAPER_SPECTRAL_MARGIN = 0.01


class _Policy(Protocol):
    """How one layer is kept stable: `hold` after each optimizer step, `project` when everything is recomputed."""

    def hold(self) -> None: ...

    def project(self) -> None: ...


class _SpectralRNN:
    """‖W_hh‖₂ ≤ bound for one layer of an `nn.RNN`."""

    def __init__(self, weight: nn.Parameter, bound: float) -> None:
        self.weight, self.bound = weight, bound

    def hold(self) -> None:
        clip_singular_values_(self.weight, self.bound)

    def project(self) -> None:
        clip_singular_values_(self.weight, self.bound)


class _MillerHardtLSTM:
    """The paper's four conditions on one layer of an `nn.LSTM`, every one a projection of rows onto L1 balls."""

    def __init__(self, layer: "_Layer", input_bound: Callable[[], float]) -> None:
        self.layer, self.input_bound = layer, input_bound
        self.bound = input_bound()
        self.rows = layer.weight_hh.new_tensor(
            [PAPER_GATE_ROWS, PAPER_FORGET_ROWS, PAPER_CANDIDATE_ROWS, PAPER_GATE_ROWS]
        ).repeat_interleave(layer.hidden_size)

    @torch.no_grad()
    def hold(self) -> None:
        layer, h = self.layer, self.layer.hidden_size
        project_rows_(layer.weight_hh, self.rows)
        drive = layer.weight_ih.new_full((h,), PAPER_FORGET_DRIVE / self.bound)
        project_rows_(layer.weight_ih[h : 2 * h], drive)
        if layer.bias_ih is not None and layer.bias_hh is not None:
            _limit_bias_(layer.bias_ih[h : 2 * h], layer.bias_hh[h : 2 * h], PAPER_FORGET_BIAS)

    def project(self) -> None:
        self.bound = self.input_bound()
        self.hold()


def _limit_bias_(bias_ih: Tensor, bias_hh: Tensor, limit: float) -> None:
    """Bring |bias_ih + bias_hh| to at most `limit`: the two add up, so each gives up half of what is too much."""
    total = bias_ih + bias_hh
    excess = (total - total.clamp(-limit, limit)) / 2
    bias_ih -= excess
    bias_hh -= excess


class _Layer:
    """The tensors of layer `index` of an `nn.RNN`, `nn.LSTM` or `nn.GRU`: views of its parameters, nothing of its own."""

    def __init__(self, module: nn.RNNBase, index: int) -> None:
        self.module, self.index, self.hidden_size = module, index, module.hidden_size
        self.weight_ih: nn.Parameter = getattr(module, f"weight_ih_l{index}")
        self.weight_hh: nn.Parameter = getattr(module, f"weight_hh_l{index}")
        self.bias_ih: nn.Parameter | None = getattr(module, f"bias_ih_l{index}") if module.bias else None
        self.bias_hh: nn.Parameter | None = getattr(module, f"bias_hh_l{index}") if module.bias else None


class Constraint:
    """What `stabilize` returns: it keeps a module stable, says what is proved about it, and can be taken off again."""

    def __init__(
        self,
        policies: list[_Policy],
        certify: Callable[[], Any],
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._policies, self._certify = policies, certify
        self._hook = None if optimizer is None else optimizer.register_step_post_hook(self._after_step)
        self.project()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for policy in self._policies:
            policy.hold()

    def project(self) -> None:
        """Move the weights to the nearest feasible ones, drive ranges and norms computed afresh."""
        for policy in self._policies:
            policy.project()

    def certificate(self) -> Any:
        """What is proved about the module as it stands now: the `Certificate` that `certify` gives."""
        return self._certify()

    def remove(self) -> None:
        """Stop projecting after optimizer steps; the weights stay as they are."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def stabilize(
    module: nn.Module,
    *,
    rate: float = 0.98,
    method: str = "certified",
    inputs: Tensor | None = None,
    input_bound: float | None = None,
    embedding: nn.Embedding | None = None,
    coupled: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> Constraint:
    """Make a recurrent module stable, in place, and keep it so after every step of `optimizer`.

    >>> rnn = nn.RNN(3, 5)
    >>> constraint = stabilize(rnn, method="miller-hardt")
    >>> bool(torch.linalg.matrix_norm(rnn.weight_hh_l0.detach(), 2) < 1)
    True
    """
    if method != "miller-hardt":
        raise InputError(f"method must be 'certified' or 'miller-hardt', got {method!r}")
    if not isinstance(module, nn.RNN | nn.LSTM):
        raise InputError("the Miller-Hardt conditions are for nn.RNN and nn.LSTM: use method='certified'")

    def bound_of_inputs() -> float:
        if input_bound is not None:
            return float(input_bound)
        if inputs is not None:
            return float(inputs.abs().max())
        if embedding is not None:
            return float(embedding.weight.detach().abs().max())
        return PAPER_INPUT_BOUND

    # In training, dropout between the layers scales the hidden states of |h| < 1 by 1 / (1 − p).
    between = 1.0 / (1.0 - module.dropout) if module.dropout < 1 else math.inf
    policies: list[_Policy] = []
    for index in range(module.num_layers):
        layer = _Layer(module, index)
        if isinstance(module, nn.RNN):
            policies.append(_SpectralRNN(layer.weight_hh, 1 - PAPER_SPECTRAL_MARGIN))
        else:
            policies.append(_MillerHardtLSTM(layer, bound_of_inputs if index == 0 else lambda: between))

    def certify_now() -> Any:
        from unrecurrent.certificate import certify

        bound = bound_of_inputs() if inputs is None and embedding is None else None
        return certify(module, inputs=inputs, input_bound=bound, embedding=embedding, method="miller-hardt")

    return Constraint(policies, certify_now, optimizer)
