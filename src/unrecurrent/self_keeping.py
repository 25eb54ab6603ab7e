"""What layers that keep themselves stable have in common: they notice that weights changed, and project them."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from unrecurrent.errors import InputError, as_number
from unrecurrent.stock import is_traced

# Held is a rate this share of 1 − λ below the one asked for, so that `certify`, which iterates, finds at most λ.
MARGIN = 1e-3
# The norm in which a layer contracts follows its weights once in so many optimizer steps.
ADAPT_EVERY = 16

_LAYERS: "weakref.WeakSet[SelfKeeping]" = weakref.WeakSet()


def checked_rate(rate: Any) -> float:
    """A contraction factor a step, between 0 and 1, or `InputError`."""
    number = as_number(rate)
    if number is None or not 0 < number < 1:
        raise InputError(f"rate must be a number between 0 and 1, both excluded, got {rate!r}")
    return number


def target(rate: float) -> float:
    """The rate that projections aim at to hold `rate`.

    >>> round(target(0.98), 6)
    0.97998
    """
    return rate - MARGIN * (1 - rate)


def _after_any_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in list(_LAYERS):
        if any(id(parameter) in moved for parameter in layer.parameters(recurse=False)):
            layer.after_step()


register_optimizer_step_post_hook(_after_any_step)


def check_norm(norm: Tensor, name: str) -> None:
    """Raise `InputError` unless these can be the weights of a norm."""
    if not bool((norm.isfinite() & (norm > 0)).all()):
        raise InputError(f"{name} is the norm a layer contracts in: it must hold finite numbers above 0")


class SelfKeeping(nn.Module):
    """Base of layers that project their own weights.

    A hook common to all `torch.optim` optimizers does it right after each step; the forward pass, `eval()`, `train()`
    and `state_dict()` do it where anything else wrote to the weights. Nothing hangs on the layer but the versions of
    its weights, so deepcopy, pickle, `torch.compile` and export see an ordinary module. Writing through `.data` is
    invisible to PyTorch's versions: call `project()` after it.
    """

    _held: tuple[int, ...] | None
    optimizer_steps: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held = None
        self.register_buffer("optimizer_steps", torch.zeros((), dtype=torch.int64))
        _LAYERS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held = None
        _LAYERS.add(self)

    def _versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters(recurse=False))

    def after_step(self) -> None:
        """Project after a step of the optimizer, and now and then let the norm follow the weights.

        It does not ask whether the versions of the weights changed: fused optimizers write to them unseen.
        """
        self.optimizer_steps += 1
        if int(self.optimizer_steps) % ADAPT_EVERY == 0:
            self._adapt()
        self._hold()
        self._held = self._versions()

    def keep(self) -> None:
        """Project if a weight was written to since the last time."""
        if self._versions() != self._held:
            self.project()

    def settle(self) -> None:
        """`keep`, and make exact what the optimizer hook did to the accuracy that a step can afford."""
        self.keep()

    def keep_before_use(self) -> None:
        """`keep`, except while the forward pass is being traced, or runs on tensors in the place of its parameters.

        An exported program changes no weights, and neither does `torch.func.functional_call` those it is given.
        """
        if not is_traced() and all(isinstance(p, nn.Parameter) for p in self._parameters.values() if p is not None):
            self.keep()

    def project(self) -> None:
        """Move the weights, in place, to nearby ones at which the rate holds; where it does, nothing changes."""
        self._project()
        self._held = self._versions()

    def _project(self) -> None:
        raise NotImplementedError

    def _hold(self) -> None:
        self._project()

    def _adapt(self) -> None:
        """Let the norm in which the layer contracts follow its weights."""

    def train(self, mode: bool = True) -> Self:
        self.settle()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = [parameter.dtype for parameter in self.parameters(recurse=False)]
        super()._apply(fn, recurse)
        parameters = list(self.parameters(recurse=False))
        if [p.dtype for p in parameters] != before and not any(p.is_meta for p in parameters):
            self.project()  # what held may no longer do so once rounded
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            loaded = state_dict.get(prefix + name)
            if isinstance(loaded, Tensor) and loaded.shape == buffer.shape:  # else torch says what is wrong
                self._check_loaded(name, loaded)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.project()

    def _check_loaded(self, name: str, loaded: Tensor) -> None:
        """Raise `InputError`, before anything is loaded, for a buffer that no layer of this rate can have."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
