"""What the recurrent layers of a model see along real data: their inputs and start states, captured by hooks.

A `Recurrence` is a layer as a plain map of flat states in float64; a `Segment` is a stretch of what it read.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from unrecurrent.cells import (
    RECURRENT_CELLS,
    AnyInput,
    Cell,
    StateLayout,
    build_cells,
    check_recurrent,
    is_recurrent,
)
from unrecurrent.errors import InputError
from unrecurrent.reading import PIECE, Piece, Reader


class CellLayer(nn.Module):
    """A `Cell` as a module with `nn.RNN`'s call, in the cell's own float64: for cells that torch has no layer of.

    `forward(x, state)` maps inputs (B, T, D) and a flat state (B, state_size) to all h (B, T, H) and the last state;
    without a state it starts from `start` (state_size,), which is zero unless given.

    >>> from unrecurrent.cells import RNNCell
    >>> layer = CellLayer(RNNCell(torch.zeros(2, 1), torch.eye(2)))
    >>> outputs, state = layer(torch.zeros(3, 5, 1))
    >>> outputs.shape, state.shape
    (torch.Size([3, 5, 2]), torch.Size([3, 2]))
    """

    cell_of_layer = True
    batch_first = True

    def __init__(self, cell: Cell, start: Tensor | None = None) -> None:
        super().__init__()
        self.cell = cell
        self.start = torch.zeros(cell.state_size, dtype=torch.float64) if start is None else start

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        current = self.start.expand(len(x), -1) if state is None else state
        outputs = []
        for x_t in x.double().unbind(1):
            current = self.cell.step(x_t, current)
            outputs.append(self.cell.hidden(current))
        return torch.stack(outputs, 1), current


class Recurrence:
    """A recurrent layer as s' = φ(x, s) on flat float64 states (B, state_size); `hidden` picks what comes out."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.state_size = cell.state_size

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        return self.cell.step(x.double(), state)

    def hidden(self, state: Tensor) -> Tensor:
        return self.cell.hidden(state)


class CacheRecurrence(Recurrence):
    """A model with `init_cache` and `step` as one recurrence: its state is the whole cache, and so is `hidden`."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).double().cpu()
        two, three = self.model.init_cache(2), self.model.init_cache(3)
        if not all(part.is_floating_point() for part in two):
            raise InputError("the cache holds integers, which have no derivative: keep counters out of the cache")
        self.axes = [
            next(axis for axis, (a, b) in enumerate(zip(p.shape, q.shape, strict=True)) if a != b)
            for p, q in zip(two, three, strict=True)
        ]
        self.shapes = [part.movedim(axis, 0)[0].shape for part, axis in zip(two, self.axes, strict=True)]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.state_size = sum(self.sizes)

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        parts = zip(state.split(self.sizes, -1), self.shapes, self.axes, strict=True)
        cache = tuple(part.reshape(-1, *shape).movedim(0, axis) for part, shape, axis in parts)
        x = x.double() if x.is_floating_point() else x
        return self.flatten(self.model.step(x, cache)[1])

    def flatten(self, cache: Sequence[Tensor]) -> Tensor:
        """The cache as one float64 vector a sequence, (B, state_size)."""
        return torch.cat([p.movedim(axis, 0).flatten(1) for p, axis in zip(cache, self.axes, strict=True)], -1)

    def hidden(self, state: Tensor) -> Tensor:
        return state


class Segment(NamedTuple):
    """A stretch of what a layer read: `inputs` (T, ...) and the state (state_size,) it started from."""

    inputs: Tensor
    start: Tensor


class Wanted(NamedTuple):
    """Which stretch to keep: steps `begin` to `begin + length` of a sequence."""

    sequence: int
    begin: int
    length: int


class Call(NamedTuple):
    """One call of a layer: what it read, from which state, and with which it ended."""

    inputs: Any
    start: Any
    end: Any

    def goes_on(self, before: "Call") -> bool:
        """Whether this call starts from the state that the one before ended with."""
        starts, ends = ((s,) if isinstance(s, Tensor) else s for s in (self.start, before.end))
        return starts is not None and all(map(torch.equal, starts, ends))


class Tap:
    """Listens to one recurrent layer: what it read and where its state began, call by call."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        self.name, self.layer = name, layer
        self.segments: list[Segment] = []
        self._parts: dict[Wanted, tuple[Tensor, list[Tensor]]] = {}
        self._calls: list[Call] = []
        self.missed = "is never called by the model"

    @property
    def kind(self) -> str:
        size = self.layer.cell.hidden_size if isinstance(self.layer, CellLayer) else self.layer.hidden_size
        shown = type(self.layer.cell if isinstance(self.layer, CellLayer) else self.layer).__name__
        layers = int(getattr(self.layer, "num_layers", 1))
        return f"{shown}, {f'{layers} layers of ' if layers > 1 else ''}{size} units"

    def recurrence(self) -> Recurrence:
        if isinstance(self.layer, CellLayer):
            return Recurrence(self.layer.cell)
        return Recurrence(build_cells(self.layer, AnyInput()))

    @contextmanager
    def listening(self) -> Iterator[None]:
        def listen(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs["input"]
            end = output if isinstance(layer, RECURRENT_CELLS) else output[1]
            self._calls.append(Call(x, args[1] if len(args) > 1 else kwargs.get("hx"), end))

        hook = self.layer.register_forward_hook(listen, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._calls.clear()

    def take(self, group: Sequence[int], piece: Piece, wanted: Mapping[int, list[Wanted]], carried: bool) -> None:
        """Keep what is wanted of the calls since the last `take`; row b of them belongs to sequence `group[b]`."""
        calls, self._calls = self._calls, []
        if not calls:
            return
        needed = [w for sequence in group for w in wanted.get(sequence, ()) if _overlaps(w, piece, carried)]
        if not needed:
            return
        # Where the layer goes on to read something else, the first will do.
        x, starts = self._joined(calls[: 1 + sum(takewhile(bool, (b.goes_on(a) for a, b in pairwise(calls))))])
        if x.shape[1] != len(group):
            self.missed = f"reads a batch of {x.shape[1]} where the model reads {len(group)}, so rows have no sequence"
            return
        if len(x) == 1 < len(calls):
            self.missed = "is called for every step with other states than it returned, so none can be followed"
            return
        for w in needed:
            row = group.index(w.sequence)
            if w.begin == piece.first:
                self._parts[w] = (starts[row].clone(), [])
            if w in self._parts:
                self._parts[w][1].append(x[: w.begin + w.length - piece.first, row].clone())

    def finish(self) -> None:
        """Turn what was kept into segments, in the order of the sequences."""
        for w in sorted(self._parts):
            start, parts = self._parts[w]
            inputs = torch.cat(parts)
            if len(inputs):
                self.segments.append(Segment(inputs, start))
        self._parts.clear()

    def _joined(self, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
        """All that was read, (T, B, ·), and the flat states (B, state_size) before it."""
        x = torch.cat([self._steps(call.inputs) for call in calls])
        return x.detach().cpu(), self._flat(calls[0].start, x.shape[1])

    def _steps(self, x: Any) -> Tensor:
        """The inputs of one call, (T, B, ·)."""
        if isinstance(self.layer, RECURRENT_CELLS):
            return x[None] if x.dim() == 2 else x[None, None]
        if isinstance(x, PackedSequence):
            return pad_packed_sequence(x)[0]
        if x.dim() == 2:
            return x[:, None]
        return x.transpose(0, 1) if getattr(self.layer, "batch_first", False) else x

    def _flat(self, hx: Any, batch: int) -> Tensor:
        if isinstance(self.layer, CellLayer):
            start = self.layer.start.expand(batch, -1) if hx is None else hx
            return start.detach().double().cpu()
        layout = StateLayout.of(self.layer)
        if hx is None:
            return torch.zeros(batch, layout.layers * layout.parts * layout.hidden_size, dtype=torch.float64)
        return layout.flatten(hx).cpu()


class CacheTap(Tap):
    """The same for a model that is a recurrence as a whole: what it reads are the data themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("", model)
        self._recurrence = CacheRecurrence(model)

    @property
    def kind(self) -> str:
        return f"{type(self.layer).__name__}, a state of {self._recurrence.state_size} numbers"

    def recurrence(self) -> Recurrence:
        return self._recurrence

    @contextmanager
    def listening(self) -> Iterator[None]:
        model: Any = self.layer
        original = model.advance

        def listen(inputs: Tensor, cache: Any) -> Any:
            outputs, after = original(inputs, cache)
            self._calls.append(Call(inputs, cache, after))
            return outputs, after

        model.advance = listen
        try:
            yield
        finally:
            del model.advance
            self._calls.clear()

    def _joined(self, calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
        x, cache, _ = calls[0]
        return x.detach().transpose(0, 1).cpu(), self._recurrence.flatten(cache).detach().double().cpu()


def _overlaps(w: Wanted, piece: Piece, carried: bool) -> bool:
    length = piece.outputs.shape[1]
    if not carried:
        return w.begin == piece.first
    return w.begin < piece.first + length and piece.first < w.begin + w.length


def find_taps(model: Any) -> tuple[list[Tap], list[str]]:
    """The recurrent layers of a model to listen to, and one sentence for each that cannot be measured."""
    if not isinstance(model, nn.Module):
        return [], []
    taps: list[Tap] = []
    notes: list[str] = []
    for name, layer in model.named_modules():
        inside = any(layer is not tap.layer and layer in tap.layer.modules() for tap in taps)
        if inside or not (is_recurrent(layer) or isinstance(layer, CellLayer)):
            continue
        try:
            check_recurrent(layer, name)
        except InputError as error:
            notes.append(f"not measured: {error}")
            continue
        taps.append(Tap(name, layer))
    if not taps and getattr(model, "recurrent", False) and hasattr(model, "advance"):
        taps.append(CacheTap(model))
    return taps, notes


def choose_segments(
    lengths: Mapping[int, int], reader: Reader, steps: int, longest: int, seed: int
) -> dict[int, list[Wanted]]:
    """Which stretches of which sequences to keep: about `steps` steps in all, at random.

    A stretch begins where a call of the model begins, because the state is known there, and is at most `longest` steps
    long; where the state is not carried from call to call, up to `steps`, so that one sequence alone is enough.
    """
    candidates = []
    for sequence, length in lengths.items():
        starts, size = reader.piece_starts(length), max(longest, steps)
        if reader.carries(length):
            starts, size = starts[:: max(1, -(-longest // PIECE))], longest
        candidates += [Wanted(sequence, begin, min(size, length - begin)) for begin in starts]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[int, list[Wanted]] = {}
    total = 0
    for candidate in (candidates[i] for i in order):
        if total >= steps:
            break
        chosen.setdefault(candidate.sequence, []).append(candidate)
        total += candidate.length
    return chosen


@dataclass(frozen=True)
class Lanes:
    """Segments side by side and one behind the other, as `count` equally long lanes of real trajectories.

    `inputs` (T, lanes, ...); `resets[t]` holds the lanes that begin a new segment at step t and their start states.
    """

    inputs: Tensor
    resets: dict[int, tuple[Tensor, Tensor]]
    remaining: Tensor
    """How many further steps of its segment each step has, (T, lanes)."""

    @property
    def count(self) -> int:
        return self.inputs.shape[1]


@torch.no_grad()
def shortened(recurrence: Recurrence, segments: Sequence[Segment], length: int) -> list[Segment]:
    """Cut segments into ones of at most `length` steps; the states between are found by running through."""
    longest = max(len(s.inputs) for s in segments)
    if longest <= length:
        return list(segments)
    inputs = nn.utils.rnn.pad_sequence([s.inputs for s in segments])
    states = torch.stack([s.start for s in segments])
    short = []
    for begin in range(0, longest, length):
        short += [
            Segment(segment.inputs[begin : begin + length], state)
            for segment, state in zip(segments, states, strict=True)
            if begin < len(segment.inputs)
        ]
        for x in inputs[begin : begin + length] if begin + length < longest else ():
            states = recurrence.step(x, states)
    return short


def make_lanes(segments: Sequence[Segment], most: int, length: int) -> Lanes:
    """Lay segments of at most `length` steps out in at most `most` lanes of `length` steps (fewer for fewer)."""
    total = sum(len(s.inputs) for s in segments)
    length = min(length, total)
    count = max(1, min(most, total // length))
    rows: list[list[Segment]] = []
    current: list[Segment] = []
    space = length
    for segment in segments:
        if len(rows) == count:
            break
        kept = Segment(segment.inputs[:space], segment.start)
        current.append(kept)
        space -= len(kept.inputs)
        if not space:
            rows.append(current)
            current, space = [], length
    resets: dict[int, list[tuple[int, Tensor]]] = {}
    remaining = torch.empty(length, len(rows), dtype=torch.long)
    for lane, row in enumerate(rows):
        begin = 0
        for segment in row:
            size = len(segment.inputs)
            resets.setdefault(begin, []).append((lane, segment.start))
            remaining[begin : begin + size, lane] = torch.arange(size - 1, -1, -1)
            begin += size
    inputs = torch.stack([torch.cat([s.inputs for s in row]) for row in rows], 1)
    stacked = {
        t: (torch.tensor([lane for lane, _ in pairs]), torch.stack([start for _, start in pairs]))
        for t, pairs in resets.items()
    }
    return Lanes(inputs, stacked, remaining)
