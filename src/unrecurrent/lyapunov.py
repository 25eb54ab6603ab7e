"""How errors in the state grow or die along real trajectories: exponents, local rates, forgetting. All are estimates.

With J_t = ∂φ/∂s at the states s_t visited and inputs x_t read, all three are about products J_{t+r} ⋯ J_{t+1}. They are
never formed where they are large: Jacobian-vector products are taken for many trajectories and directions at once.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from unrecurrent.trajectories import Lanes, Recurrence, Segment

Say = Callable[[float], None]

#: steps at the start of every lane in which directions align, not counted: this share, at most this many
TRANSIENT_SHARE, TRANSIENT_MOST = 0.2, 200
#: blocks of time whose means give the band of an exponent
BLOCKS = 8
#: up to this state size products of Jacobians are formed and their norm is exact
DENSE_SIZE = 64
#: directions and rounds of the iteration for the norm of larger ones
DIRECTIONS, ROUNDS = 4, 8


@cache
def _prepare_forward_mode() -> None:
    """Let torch load its rules for Jacobian-vector products, which warns about torch's own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.tanh, (torch.zeros(1),), (torch.ones(1),))


def tangent_step(recurrence: Recurrence, x: Tensor, state: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """One step φ(x, s) for states (N, S), and the images J·v of directions (K, N, S), all at once.

    >>> from unrecurrent.cells import RNNCell
    >>> linear_at_zero = Recurrence(RNNCell(torch.zeros(2, 1), torch.tensor([[0.5, 0.0], [0.0, 0.25]])))
    >>> state, eye = torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[:, None]
    >>> tangent_step(linear_at_zero, torch.zeros(1, 1), state, eye)[1][:, 0].tolist()
    [[0.5, 0.0], [0.0, 0.25]]
    """

    _prepare_forward_mode()

    def step(s: Tensor) -> Tensor:
        return recurrence.step(x, s)

    def along(v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(step, (state,), (v,))  # type: ignore[return-value]

    moved, images = torch.func.vmap(along, out_dims=(None, 0))(directions)  # type: ignore[arg-type]
    return moved, images


def jacobians(recurrence: Recurrence, x: Tensor, state: Tensor) -> Tensor:
    """The plain reference: all Jacobians ∂φ/∂s (N, S, S) by reverse mode, one state after the other."""
    each = [
        torch.autograd.functional.jacobian(lambda s, x_n=x_n: recurrence.step(x_n[None], s[None])[0], s_n)
        for x_n, s_n in zip(x, state, strict=True)
    ]
    return torch.stack([torch.as_tensor(j) for j in each])


@dataclass(frozen=True)
class Passage:
    """One pass along the lanes: growth of each direction (T, lanes, K), and states visited at some steps.

    `times[i]` is the step before which the states `states[i]` (lanes, S) were visited.
    """

    growth: np.ndarray
    transient: int
    times: tuple[int, ...]
    states: Tensor


@torch.no_grad()
def follow(
    recurrence: Recurrence, lanes: Lanes, count: int, snapshots: int, say: Say = lambda fraction: None
) -> Passage:
    """Follow the trajectories with `count` orthonormal directions: Q R = J_t Q at every step, growth log |R_ii|.

    Source: Benettin, Galgani, Giorgilli and Strelcyn, Meccanica 15 (1980); for recurrent networks Engelken, Wolf and
    Abbott, *Lyapunov spectra of chaotic recurrent neural networks*, Physical Review Research 5 (2023). Where a segment
    ends and the next begins, the state is set to that segment's start and the directions go on.
    """
    steps, size = len(lanes.inputs), recurrence.state_size
    count = min(count, size)
    state = torch.zeros(lanes.count, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(lanes.count, size, count, generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(frame)[0] if count else frame
    growth = np.empty((steps, lanes.count, count))
    keep = set(np.unique(np.linspace(0, steps - 1, snapshots).astype(int)).tolist())
    kept: dict[int, Tensor] = {}
    for t, x in enumerate(lanes.inputs):
        if t in lanes.resets:
            rows, starts = lanes.resets[t]
            state = state.index_copy(0, rows, starts)
        if t in keep:
            kept[t] = state
        if count:
            state, images = tangent_step(recurrence, x, state, frame.permute(2, 0, 1))
            frame, triangle = torch.linalg.qr(images.permute(1, 2, 0))
            growth[t] = triangle.diagonal(dim1=-2, dim2=-1).abs().log().numpy()
        else:
            state = recurrence.step(x, state)
        say((t + 1) / steps)
    transient = min(int(TRANSIENT_SHARE * steps), TRANSIENT_MOST)
    return Passage(growth, transient, tuple(kept), torch.stack(list(kept.values())))


def exponents(passage: Passage) -> np.ndarray:
    """The Lyapunov exponents a step, largest first, with their 95 % band: (K, 3) of mean, low and high.

    The band is Student's t over the means of blocks of time, lane by lane, which are taken to be independent.
    """
    growth = passage.growth[passage.transient :]
    blocks = max(1, -(-BLOCKS // growth.shape[1]))
    means = np.concatenate([part.mean(0) for part in np.array_split(growth, min(blocks, len(growth)))])
    mean = growth.mean((0, 1))
    with np.errstate(invalid="ignore"):
        spread = means.std(0, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.full(mean.shape, np.nan)
    half = stdtrit(max(1, len(means) - 1), 0.975) * spread
    half = np.where(np.isfinite(mean), half, 0.0)
    rows = np.stack([mean, mean - half, mean + half], 1)
    return rows[np.argsort(-mean, kind="stable")]


@torch.no_grad()
def local_rates(recurrence: Recurrence, inputs: Tensor, states: Tensor) -> np.ndarray:
    """‖J_r ⋯ J_1‖₂^(1/r): the largest growth a step over r steps, for N states (N, S) and inputs (r, N, ...).

    Exact up to a state of `DENSE_SIZE`; beyond by subspace iteration on J and Jᵀ, which approaches it from below.
    """
    count, size = states.shape
    if size <= DENSE_SIZE:
        product = torch.eye(size, dtype=torch.float64)[:, None].expand(size, count, size)
        norms = torch.linalg.svdvals(_along(recurrence, inputs, states, product).permute(1, 2, 0))[:, 0]
    else:
        norms = _norm_by_iteration(recurrence, inputs, states)
    return (norms ** (1 / len(inputs))).numpy()


def _along(recurrence: Recurrence, inputs: Tensor, states: Tensor, directions: Tensor) -> Tensor:
    for x in inputs:
        states, directions = tangent_step(recurrence, x, states, directions)
    return directions


def _norm_by_iteration(recurrence: Recurrence, inputs: Tensor, states: Tensor) -> Tensor:
    def run(s: Tensor) -> Tensor:
        for x in inputs:
            s = recurrence.step(x, s)
        return s

    back = torch.func.vmap(lambda cotangent: torch.func.vjp(run, states)[1](cotangent)[0])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(states), states.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(start)[0]
    for _ in range(ROUNDS):
        images = _along(recurrence, inputs, states, frame.permute(2, 0, 1))
        frame = torch.linalg.qr(back(images).permute(1, 2, 0))[0]
    images = _along(recurrence, inputs, states, frame.permute(2, 0, 1))
    return torch.linalg.svdvals(images.permute(1, 2, 0))[:, 0]


@torch.no_grad()
def forgetting(
    recurrence: Recurrence,
    segments: Sequence[Segment],
    others: Tensor,
    lags: Sequence[int],
    say: Say = lambda fraction: None,
) -> np.ndarray:
    """Distances of trajectories that read the same segment from different states: (lags, segments · others).

    The first starts where the model did, the others at `others` (segments, M, S). The distance at lag j is the largest
    difference of any component of h after j steps; NaN where the segment is shorter.
    """
    lengths = torch.tensor([len(s.inputs) for s in segments])
    inputs = torch.nn.utils.rnn.pad_sequence([s.inputs for s in segments])
    start = torch.stack([s.start for s in segments])
    count, copies = others.shape[0], others.shape[1] + 1
    states = torch.cat([start[:, None], others], 1).flatten(0, 1)
    distances = np.full((len(lags), count * (copies - 1)), np.nan)
    rows = {lag: row for row, lag in enumerate(lags)}
    for t in range(min(int(lengths.max()), lags[-1])):
        states = recurrence.step(inputs[t].repeat_interleave(copies, 0), states)
        if t + 1 in rows:
            hidden = recurrence.hidden(states).unflatten(0, (count, copies))
            apart = (hidden[:, 1:] - hidden[:, :1]).abs().amax(-1)
            apart[lengths <= t] = torch.nan
            distances[rows[t + 1]] = apart.flatten().numpy()
        say((t + 1) / lags[-1])
    return distances
