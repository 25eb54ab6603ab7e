"""Compile and load the C loops of this folder; where there is no compiler, the PyTorch code beside them does the work.

`row_budgets.c` holds what projections do row by row, `gates.c` what a step of `StableLSTM` does number by number,
`recurrence.c` recurrent layers over many steps. The first use of each on a float32 tensor on the CPU compiles it (less
than a second) into the user's cache folder; set `UNRECURRENT_COMPILE=0` to do without.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROWS, GATES, RECURRENCE = "row_budgets", "gates", "recurrence"
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math")
# Sums over a row may be reordered so that they vectorize; unlike -ffast-math this does not change how the process
# rounds.
FLAGS = {ROWS: (*_FLAGS, "-fno-signed-zeros", "-fassociative-math"), GATES: _FLAGS, RECURRENCE: _FLAGS}
HEADER = "activations.h"
SHARED_BY_THREADS = "-fopenmp"
MOST_GATES = 3
KINDS = {"mixture": 0, "gru": 1, "lstm": 2}
ROUNDS = 100


class _Layer(ctypes.Structure):
    """The struct of the same name in the C file."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "gates", "size", "pieces", "rounds")),
        ("gate", ctypes.c_int32 * MOST_GATES),
        ("output", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("rate", "rounding", "tolerance")),
    )


class _Drive(ctypes.Structure):
    """The struct of the same name in the C file."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("inputs", "keeping", "tied", "drive_rounds")),
        *((name, ctypes.c_float) for name in ("bound", "cap", "hidden_bound")),
        *(
            (name, ctypes.c_float)
            for name in ("likely_rows", "keeps_tolerance", "lowest", "shut", "tolerance", "margin")
        ),
    )


_TENSORS = ("weight_hh", "weight_ih", "bias_ih", "bias_hh", "highest", "v", "v_cell", "ones")
_PIECES = ("slope", "reach", "output_slope", "output_reach")


class _Tensors(ctypes.Structure):
    """The struct of the same name in the C file."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in (*_TENSORS, *_PIECES))


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "unrecurrent"


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.c")


def _fingerprint(compiler: str, name: str, used: Sequence[str]) -> str:
    """What the compiled file depends on; a home folder may be shared by machines with different processors."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    sources = (_source(name).read_text(), Path(__file__).with_name(HEADER).read_text())
    text = "\n".join((*sources, compiler, *used, platform.machine(), flags))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def library(name: str = ROWS) -> ctypes.CDLL | None:
    """The compiled functions of a file, or None where they cannot be had."""
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if os.environ.get("UNRECURRENT_COMPILE") == "0" or compiler is None:
        return None
    for flags in ((*FLAGS[name], SHARED_BY_THREADS), FLAGS[name]):
        try:
            return ctypes.CDLL(str(_compiled(compiler, name, flags)))
        except (OSError, RuntimeError, subprocess.SubprocessError):  # RuntimeError: there is no home folder
            continue
    return None


def _compiled(compiler: str, name: str, flags: Sequence[str]) -> Path:
    """The path of the shared library; written under another name and renamed, so that nobody loads half of it.

    It is linked with no library for threads: the loader finds torch's, so that both use the same threads, or fails.
    """
    target = _cache_folder() / f"{name}-{_fingerprint(compiler, name, flags)}.so"
    if not target.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part, made = Path(folder) / f"{name}.o", Path(folder) / target.name
            for command in (
                [compiler, *flags, "-fPIC", "-c", str(_source(name)), "-o", str(part)],
                [compiler, "-shared", str(part), "-o", str(made), "-lm"],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=60)
            made.replace(target)
    return target


def takes(*weights: Tensor) -> bool:
    """Whether the C functions can work on these matrices."""
    if torch.compiler.is_compiling() or library() is None:
        return False
    return all(w.dtype is torch.float32 and w.is_cpu and w.is_contiguous() for w in weights)


#: numbers a step may have for one thread to be as fast as torch's threads together
MOST_GATED = 1 << 16


def gates(like: Tensor) -> ctypes.CDLL | None:
    """Return the functions of `gates.c` if they take steps whose cells are like this tensor `(B, H)`."""
    taken = like.dtype is torch.float32 and like.is_cpu and like.numel() <= MOST_GATED
    return library(GATES) if taken else None


def call_gated(function: Any, like: Tensor, *tensors: Tensor) -> None:
    """Call a function of `gates.c` for cells like `(B, H)` on contiguous tensors, in the order it names them."""
    function(*like.shape, *map(_pointer, tensors))


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous()


def _layer(
    size: int,
    rounding: float,
    *,
    kind: str = "mixture",
    gates: Sequence[int] = (),
    output: int | None = None,
    rate: float = 0.0,
    pieces: int = 0,
    tolerance: float = 0.0,
) -> _Layer:
    blocks = (ctypes.c_int32 * MOST_GATES)(*gates)
    last = -1 if output is None else output
    return _Layer(KINDS[kind], len(gates), size, pieces, ROUNDS, blocks, last, rate, rounding, tolerance)


def _mark_written(*tensors: Tensor) -> None:
    """Let autograd know that they were written to, which it cannot see of a write from C."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def row_sums(weight: Tensor, weights: Tensor) -> Tensor:
    """`weighted_row_sums` of a matrix that `takes` accepts, `(..., K)` and `(K,)`."""
    functions, column = library(), _plain(weights)
    assert functions is not None
    sums = torch.empty(weight.shape[:-1], dtype=torch.float32)
    functions.row_sums(_pointer(weight), sums.numel(), weight.shape[-1], _pointer(column), _pointer(sums))
    return sums


def hold_l1(weight: Tensor, weights: Tensor, limit: Tensor, rounding: float, tolerance: float) -> None:
    """Project the rows of a matrix `(J, K)` onto the weighted L1 balls of radius `limit` `(J,)`, in place."""
    functions, column, limits = library(), _plain(weights), _plain(limit)
    assert functions is not None
    layer = _layer(weight.shape[1], rounding, tolerance=tolerance)
    pointers = (_pointer(column), _pointer(limits))
    if functions.hold_l1(ctypes.byref(layer), _pointer(weight), weight.shape[0], *pointers):
        _mark_written(weight)


def lower_drive(
    weight: Tensor, biases: tuple[Tensor, Tensor], bound: float, room: Tensor, tolerance: float, rounds: int
) -> None:
    """Lower bound · Σ|weight[j]| + both biases to at most `room` `(J,)`, in place and with the smallest change."""
    functions, ones, limits = library(), weight.new_ones(weight.shape[1]), _plain(room)
    assert functions is not None
    given = (_pointer(ones), ctypes.c_float(bound), _pointer(limits), *map(_pointer, biases))
    if functions.lower_drive(_pointer(weight), *weight.shape, *given, ctypes.c_float(tolerance), rounds):
        _mark_written(weight, *biases)


def hold_rows(
    weight: Tensor,
    *,
    kind: str,
    gates: Sequence[int],
    output: int | None,
    rate: float,
    rounding: float,
    tolerance: float,
    norm: Tensor,
    units: Sequence[Tensor],
    pieces: Sequence[Tensor],
) -> None:
    """`hold_rows_` of feasible.py. `units` are ceiling, gate scale, candidate bound and output budget, each `(H,)`;

    `pieces` are slope and magnitude of the candidate's tanh, each `(P,)`.
    """
    functions = library()
    assert functions is not None
    count = pieces[0].numel()
    layer = _layer(
        weight.shape[1],
        rounding,
        kind=kind,
        gates=gates,
        output=output,
        rate=rate,
        pieces=count,
        tolerance=tolerance,
    )
    arrays = [_plain(tensor) for tensor in (norm[-1], norm[0], *units, *pieces)]
    if functions.hold_rows(ctypes.byref(layer), _pointer(weight), *map(_pointer, arrays)):
        _mark_written(weight)


class PaperRows:
    """`_MillerHardtLSTM._keep` of stability.py in one call; `limits` are those of the rows of each gate."""

    def __init__(self, size: int, inputs: int, limits: Sequence[float], rounding: float, tolerance: float) -> None:
        self._layer = _layer(size, rounding, tolerance=tolerance)
        self._layer.gates = len(limits)
        self._limits, self._ones = torch.tensor(limits), torch.ones(max(size, inputs))

    def __call__(self, weights: Sequence[Tensor], drive: float, forget: int, bias: float) -> None:
        """Hold weight_hh, weight_ih and, where there are any, bias_ih and bias_hh, in place."""
        functions = library()
        assert functions is not None
        weight_hh, weight_ih, *biases = weights
        given = (_pointer(weight_hh), _pointer(self._ones), _pointer(self._limits), _pointer(weight_ih))
        b_ih, b_hh = (_pointer(b) for b in biases) if biases else (None, None)
        last = (ctypes.c_float(drive), b_ih, b_hh, forget, ctypes.c_float(bias))
        functions.hold_paper(ctypes.byref(self._layer), *given, weight_ih.shape[1], *last)
        _mark_written(*weights)


class HeldLayer:
    """`_Rows._keep` of stability.py in one call: budgets, ceilings and drives of all units of a layer.

    Made once for the budgets of a layer (`RowBudget`); `drive` are the fields of the struct `Drive` but the bound. The
    tensors it works on are looked up anew in each call.
    """

    def __init__(self, budget: Any, rounding: float, tolerance: float, drive: dict[str, float]) -> None:
        size, pieces = budget.ceiling.shape[0], (budget.candidate, budget.squashed)
        self._layer = _layer(
            size,
            rounding,
            kind=budget.kind,
            gates=budget.gates,
            output=budget.output,
            rate=budget.rate,
            pieces=pieces[0].slope.numel(),
            tolerance=tolerance,
        )
        self._drive = _Drive(**drive)
        self._pieces = [_plain(tensor) for piece in pieces for tensor in (piece.slope, piece.magnitude)]
        self._ones = torch.ones(max(size, self._drive.inputs))

    def __call__(self, weights: Sequence[Tensor], bound: float | None, highest: Tensor | None, norm: Tensor) -> None:
        """Hold weight_hh, weight_ih, bias_ih, bias_hh, in place; inputs within `bound`, or drives up to `highest`."""
        functions = library()
        assert functions is not None
        self._drive.bound = -1.0 if bound is None else bound
        drives = self._ones if highest is None else _plain(highest)
        norm = _plain(norm)
        tensors = (*weights, drives, norm[-1], norm[0], self._ones, *self._pieces)
        pointers = _Tensors(*(tensor.data_ptr() for tensor in tensors))
        moved = functions.hold_layer(ctypes.byref(self._layer), ctypes.byref(self._drive), ctypes.byref(pointers))
        if moved or self._drive.tied >= 0:
            _mark_written(*weights)


class _Series(ctypes.Structure):
    """The struct of the same name in the C file."""

    _fields_ = (("first", ctypes.c_void_p), ("step", ctypes.c_int64), ("row", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor) -> "_Series":
        """Of a tensor (steps, rows, numbers) whose numbers lie side by side."""
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class _Panels(ctypes.Structure):
    """The struct `Layer` in the C file."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "size", "inputs", "driven")),
        *((name, ctypes.c_void_p) for name in ("input_panels", "recurrent_panels", "bias", "ceiling")),
    )


#: the layers of `recurrence.c`, in the order of its enum
RECURRENT_KINDS = ("rnn_tanh", "rnn_relu", "gru", "lstm", "scaled-gate-lstm")


class Recurrence:
    """A recurrent layer with its weights laid out for `recurrence.c`: many steps of many rows in one call.

    `weight_ih` `(G H, D)` and `weight_hh` `(G H, H)` as in the layer; `bias` `(S H,)` what is added to each sum, where
    a GRU has four: those of r and z, and of the candidate U x and W h apart; `ceiling` `(H,)` that of `StableLSTM`.
    Without `weight_ih` the layer reads U x + b of all gates, `(G H,)`, in the place of x and the biases of U x.
    """

    def __init__(
        self, kind: str, weight_ih: Tensor | None, weight_hh: Tensor, bias: Tensor, ceiling: Tensor | None = None
    ) -> None:
        self._functions = library(RECURRENCE)
        assert self._functions is not None
        size, width = weight_hh.shape[1], self._functions.unit_block()
        driven = weight_ih is None
        of_inputs = weight_hh.new_zeros(len(weight_hh), 0) if weight_ih is None else weight_ih
        self._kept = [_panels(weight, size, width) for weight in (of_inputs, weight_hh, bias[:, None])]
        self._kept.append(_plain(bias.new_ones(size) if ceiling is None else ceiling))
        pointers = (tensor.data_ptr() for tensor in self._kept)
        self._layer = _Panels(RECURRENT_KINDS.index(kind), size, of_inputs.shape[1], driven, *pointers)

    @staticmethod
    def takes(dtype: torch.dtype) -> bool:
        return dtype is torch.float32 and library(RECURRENCE) is not None

    def run(self, x: Tensor, h: Tensor, cell: Tensor | None, y: Tensor) -> None:
        """Read x `(steps, rows, D)` from h `(rows, H)`; write y `(steps, rows, H)`, and the new cell state in place."""
        x = x.resolve_neg()  # a view that is negated when it is read has the memory of what is not
        x = x if x.stride(-1) == 1 else x.contiguous()
        states = (_pointer(h), _pointer(h if cell is None else cell))
        given = (ctypes.byref(_Series.of(x)), *states, ctypes.byref(_Series.of(y)))
        assert self._functions is not None
        self._functions.run_steps(ctypes.byref(self._layer), *x.shape[:2], *given, torch.get_num_threads())


def _panels(weight: Tensor, size: int, width: int) -> Tensor:
    """A weight (G size, K) as (blocks of `width` units, G, K, width), the last block filled up with zeros."""
    gates = weight.detach().float().unflatten(0, (-1, size))
    blocks = torch.nn.functional.pad(gates, (0, 0, 0, -size % width)).unflatten(1, (-1, width))
    return blocks.permute(1, 0, 3, 2).contiguous()
