"""How a causal model is read along sequences of any length: in pieces, so that memory stays bounded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unrecurrent.cells import RECURRENT_CELLS, is_recurrent
from unrecurrent.errors import InputError

#: steps of a long sequence read at once by models whose state can be carried
PIECE = 512
#: longest sequence read at once by a model whose state cannot be carried; longer ones are read in overlapping blocks
WHOLE = 8_192
#: steps on which it is tried whether a model's state can be carried
TRIAL = 64
#: steps on which it is tried whether a model looks ahead: by up to half as many steps, that is
LOOK_AHEAD = 1_024
#: outputs are the same if they differ by no more than this share of what they vary by over time, and by rounding: so
#: many units in the last place of their level
OF_VARIATION, OF_LAST_PLACE = 1e-4, 8


@dataclass(frozen=True)
class Piece:
    """One call of the model: `outputs` (B, T, ...) for the steps from `first`; those before `new` were given before."""

    first: int
    new: int
    outputs: Tensor


class Reader:
    """Reads batches of equally long sequences from their start, in the best way the model allows.

    A model with `init_cache` and `advance` carries its own state from piece to piece. In any other module that holds
    torch's recurrent layers their states are handed on by hooks, if a trial shows that this gives the same outputs.
    What remains is read at once up to `WHOLE` steps, and beyond in blocks that overlap by half: `context` is then the
    number of inputs which the first new output of a block has seen.
    """

    def __init__(self, model: Callable[[Tensor], Any], device: torch.device) -> None:
        self.model, self.device = model, device

    def carries(self, length: int) -> bool:
        """Whether the state at the start of each piece is the one at the end of the piece before."""
        return self._has_cache or (length > WHOLE and self._state_can_be_carried)

    def piece_starts(self, length: int) -> range:
        """The first steps of the calls for a sequence of this length."""
        if self.carries(length):
            return range(0, length, PIECE)
        return range(0, 1) if length <= WHOLE else range(0, length - WHOLE // 2, WHOLE // 2)

    def context(self, length: int) -> int | None:
        """The fewest inputs an output sees that ought to see all before it; None: it sees all."""
        return None if length <= WHOLE or self.carries(length) else WHOLE // 2

    def steps_a_call(self, length: int) -> int:
        return min(length, PIECE if self.carries(length) else WHOLE)

    def read(self, group: Sequence[Tensor]) -> Iterator[Piece]:
        """Yield the outputs along sequences (T, ...) of equal length."""
        length = len(group[0])
        if self._has_cache:
            yield from self._with_cache(group)
        elif self.carries(length):
            with carrying(self._layers):
                for start in range(0, length, PIECE):
                    yield Piece(start, start, self.run(self._cut(group, start, start + PIECE)))
        else:
            seen = 0
            for start in self.piece_starts(length):
                outputs = self.run(self._cut(group, start, start + WHOLE))
                yield Piece(start, seen, outputs)
                seen = start + outputs.shape[1]

    def run(self, inputs: Tensor) -> Tensor:
        """Return the model's outputs (B, T, ...) for inputs (B, T, ...) from its zero state."""
        with _explained(inputs):
            outputs = self.model(inputs)
        if not isinstance(outputs, Tensor) or outputs.shape[:2] != inputs.shape[:2]:
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise InputError(
                f"the model must map inputs (B, T, ...) to one tensor (B, T, outputs), but {tuple(inputs.shape)} gave"
                f" {shape}: wrap it in a module that does"
            )
        return outputs

    def check_causal(self, inputs: Tensor) -> None:
        """Raise `InputError` if outputs are NaN or change when later inputs do; `inputs` is one sequence (T, ...)."""
        first = inputs[:LOOK_AHEAD].to(self.device)
        if len(first) < 2:
            return
        cut = (len(first) + 1) // 2
        changed = first.clone()
        changed[cut:] = _other_values(first[cut:], inputs)
        outputs = self.run(torch.stack([first, changed]))[:, :cut]
        if outputs[0].isnan().any():
            raise InputError("the model's outputs are NaN on these data: check its weights")
        if not _close(outputs[0], outputs[1]):
            raise InputError(
                "the model is not causal: an output changes when later inputs change (a bidirectional layer, or"
                " attention without a mask), so the past it needs cannot be measured; give a causal model"
            )

    @property
    def _has_cache(self) -> bool:
        return hasattr(self.model, "advance") and hasattr(self.model, "init_cache")

    def _with_cache(self, group: Sequence[Tensor]) -> Iterator[Piece]:
        model: Any = self.model
        cache = model.init_cache(len(group))
        for start in range(0, len(group[0]), PIECE):
            piece = self._cut(group, start, start + PIECE)
            with _explained(piece):
                outputs, cache = model.advance(piece, cache)
            yield Piece(start, start, outputs)

    def _cut(self, group: Sequence[Tensor], start: int, end: int) -> Tensor:
        return torch.stack([inputs[start:end] for inputs in group]).to(self.device)

    @cached_property
    def _layers(self) -> list[nn.Module]:
        if not isinstance(self.model, nn.Module):
            return []
        layers = [m for m in self.model.modules() if is_recurrent(m) or hasattr(m, "cell_of_layer")]
        return [] if any(isinstance(layer, RECURRENT_CELLS) for layer in layers) else layers

    @cached_property
    def _state_can_be_carried(self) -> bool:
        """Whether handing on the states of the recurrent layers is all it takes to read in pieces, by trial."""
        if not self._layers or self._trial_inputs is None:
            return False
        inputs, cut = self._trial_inputs[None].to(self.device), TRIAL * 5 // 8
        whole = self.run(inputs)
        with carrying(self._layers):
            parts = [self.run(inputs[:, :cut]), self.run(inputs[:, cut:])]
        return _close(whole[0], torch.cat(parts, 1)[0])

    _trial_inputs: Tensor | None = None

    def try_on(self, inputs: Tensor) -> None:
        """Name the sequence (T, ...) whose beginning decides whether states can be carried."""
        self._trial_inputs = inputs[:TRIAL]


@contextmanager
def _explained(inputs: Tensor) -> Iterator[None]:
    """One sentence for inputs that the model cannot read."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"the model fails on inputs of shape {tuple(inputs.shape)} and type {inputs.dtype} ({reason}): give"
            " it inputs that it can read"
        ) from error


def _other_values(inputs: Tensor, sequence: Tensor) -> Tensor:
    """Inputs unlike these: the same numbers moved, or at each step another symbol that occurs in the sequence."""
    generator = torch.Generator().manual_seed(0)
    if inputs.is_floating_point():
        noise = torch.randn(inputs.shape, generator=generator).to(inputs)
        return inputs + noise * (1 + inputs.abs())
    if inputs.dtype == torch.bool:
        return ~inputs
    known = sequence.unique().to(inputs.device)
    if len(known) == 1:  # 0 is the only other symbol that any vocabulary has
        return torch.zeros_like(inputs)
    moves = torch.randint(1, len(known), inputs.shape, generator=generator).to(inputs.device)
    return known[(torch.searchsorted(known, inputs.contiguous()) + moves) % len(known)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether outputs (T, ...) are the same up to rounding, each of them by its own size.

    The level of an output says nothing about what its inputs do to it: large numbers may vary little.
    """
    last_place = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
    a, b = a.double(), b.double()
    allowed = OF_VARIATION * a.std(0, correction=0) + OF_LAST_PLACE * last_place * a.abs().amax(0)
    return bool(((a == b) | ((a - b).abs() <= allowed)).all())


@contextmanager
def carrying(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Start each call of the layers from the state in which the call before ended."""
    states: dict[nn.Module, Any] = {}

    def start(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if layer not in states:
            return None
        return (args[0], states[layer]), {key: value for key, value in kwargs.items() if key != "hx"}

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        states[layer] = output[1]

    hooks = [layer.register_forward_pre_hook(start, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
