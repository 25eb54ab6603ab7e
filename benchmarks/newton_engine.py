"""Newton's method over time (DEER, and quasi-DEER with diagonal Jacobians) against chunks: results/newton_engine.json.

    python benchmarks/newton_engine.py

All states at once are unknowns: s_t = f(s_{t-1}, x_t) for every t. A Newton step linearises f along the current guess
and solves the linear recurrence by a parallel scan (Lim et al., arXiv:2309.12252); the quasi-Newton one keeps only the
diagonal of the Jacobians (Gonzalez et al., arXiv:2407.19115). Iterations stop when a step moves no state by more than
a tenth of the tolerance. Both give the answer of the sequential run; the question is what they cost. One sequence in
float32, layers as PyTorch initialises them; the depth counts steps that wait for one another (a scan: 2 log2 T). Chunks
are cut for speed (128 steps kept) and for small depth (16 steps kept), their check included.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from unrecurrent import run_parallel
from unrecurrent.records import make_record, write_records

TOL, ROUNDS, MOST_ITERATIONS = 1e-4, 5, 60
CASES = [("rnn", 32, 8192), ("gru", 32, 8192), ("rnn", 128, 2048), ("gru", 128, 2048)]
LARGEST_JACOBIANS = 1 << 26  # numbers; beyond this full Jacobians do not fit the caches, nor soon the memory
PATH = Path(__file__).parents[1] / "results" / "newton_engine.json"


def drive(module: nn.RNNBase, x: Tensor) -> Tensor:
    return nn.functional.linear(x[:, 0], module.weight_ih_l0, module.bias_ih_l0)


def step_and_parts(module: nn.RNNBase, drives: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """f for all steps at once, (T, H), and the factors d such that its Jacobian is Σ diag(d_g) W_g (+ diag(d_0))."""
    pre = nn.functional.linear(h, module.weight_hh_l0, module.bias_hh_l0)
    if module.mode == "RNN_TANH":
        new = torch.tanh(drives + pre)
        return new, [torch.zeros_like(new), 1 - new * new]
    drive_r, drive_z, drive_n = drives.chunk(3, -1)
    pre_r, pre_z, pre_n = pre.chunk(3, -1)
    r, z = torch.sigmoid(drive_r + pre_r), torch.sigmoid(drive_z + pre_z)
    n = torch.tanh(drive_n + r * pre_n)
    slope = (1 - z) * (1 - n * n)
    return n + z * (h - n), [z, slope * pre_n * r * (1 - r), (h - n) * z * (1 - z), slope * r]


def jacobians(module: nn.RNNBase, parts: list[Tensor], diagonal: bool) -> Tensor:
    own, *gates = parts
    weights = module.weight_hh_l0.chunk(len(gates))
    if diagonal:
        return own + sum(d * w.diagonal() for d, w in zip(gates, weights, strict=True))
    return torch.diag_embed(own) + sum(d[:, :, None] * w for d, w in zip(gates, weights, strict=True))


def scan(a: Tensor, b: Tensor, diagonal: bool) -> Tensor:
    """All s_t of s_t = a_t s_{t-1} + b_t from s_{-1} = 0, by recursive doubling over halves: 2 log2 T rounds."""
    if len(a) == 1:
        return b
    times = torch.mul if diagonal else lambda m, v: (m @ v[..., None])[..., 0]
    even = len(a) // 2 * 2
    first, second = a[0:even:2], a[1:even:2]
    both = second * first if diagonal else second @ first
    odd_states = scan(both, times(second, b[0:even:2]) + b[1:even:2], diagonal)
    states = torch.empty_like(b)
    states[1:even:2] = odd_states
    states[0] = b[0]
    before = odd_states[: (len(a) - 1) // 2]
    states[2::2] = times(a[2::2], before) + b[2::2]
    return states


def newton(module: nn.RNNBase, x: Tensor, diagonal: bool) -> tuple[Tensor, int]:
    """The outputs (T, 1, H) and the number of iterations; not finite or not converged: MOST_ITERATIONS."""
    drives = drive(module, x)
    states = torch.zeros(len(x), module.hidden_size)
    moved, iteration = torch.full_like(states, float("inf")), 0
    while moved.abs().max() > TOL / 10 and iteration < MOST_ITERATIONS:
        before = torch.cat([torch.zeros(1, module.hidden_size), states[:-1]])
        new, parts = step_and_parts(module, drives, before)
        jacobian = jacobians(module, parts, diagonal)
        moved = scan(jacobian, new - states, diagonal)  # s' - s of the next guess
        states, iteration = states + moved, iteration + 1
    return states[:, None], iteration


def median_seconds(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(model: str, size: int, steps: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    module, x = {"rnn": nn.RNN, "gru": nn.GRU}[model](size, size), torch.randn(steps, 1, size)
    runs: dict[str, Callable[[], object]] = {
        "torch": lambda: module(x),
        "chunks": lambda: run_parallel(module, x, chunks=steps // 128, warmup=32),
        "shallow chunks": lambda: run_parallel(module, x, chunks=steps // 16, warmup=32),
        "quasi-deer": lambda: newton(module, x, diagonal=True),
    }
    if steps * size * size <= LARGEST_JACOBIANS:
        runs["deer"] = lambda: newton(module, x, diagonal=False)
    seconds, own, records = median_seconds(runs), module(x)[0], []
    for variant in list(runs)[1:]:
        if "chunks" in variant:
            y, _, evidence = runs[variant]()
            depth, iterations = evidence.sequential_depth, None
        else:
            y, iterations = runs[variant]()
            depth = iterations * 2 * math.ceil(math.log2(steps))
        records.append(
            make_record(
                command="python benchmarks/newton_engine.py",
                task="random-sequence",
                model=model,
                variant=variant,
                metric="speedup",
                mean=round(seconds["torch"] / seconds[variant], 3),
                seeds=1,
                baseline="torch",
                hidden_size=size,
                steps=steps,
                seconds=round(seconds[variant], 5),
                iterations=iterations,
                sequential_depth=depth,
                largest_error=float((y - own).abs().max()),
            )
        )
        shown = records[-1]
        print(f"{model} {size} T={steps} {variant:14} {shown['mean']:7.2f}x, depth {depth}, {iterations} iterations, "
              f"error {shown['largest_error']:.1e}", flush=True)  # fmt: skip
    return records


def main() -> None:
    torch.set_grad_enabled(False)
    records: list[dict[str, object]] = []
    for case in CASES:
        records += measure(*case)
        write_records(PATH, records)
    fastest: dict[tuple[object, ...], tuple[float, str]] = {}
    for record in records:
        layer = (record["model"], record["hidden_size"], record["steps"])
        fastest[layer] = max(fastest.get(layer, (0.0, "")), (record["mean"], record["variant"]))
    wins = sum("deer" in variant for _, variant in fastest.values())
    print(f"Newton iterations are the fastest in {wins} of {len(fastest)} cases")


if __name__ == "__main__":
    main()
