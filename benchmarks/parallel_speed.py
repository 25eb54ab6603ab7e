"""How much faster `run_parallel` is than `nn.RNN/GRU/LSTM` and onnxruntime, on one long sequence.

    python benchmarks/parallel_speed.py            (about four minutes on two cores; writes results/parallel_speed.json)
    python benchmarks/parallel_speed.py RNN GRU    (some kinds only; their records replace the old ones)

One sequence (B = 1) of 32,768 steps in float32, layers as PyTorch initialises them, as many inputs as units. The runs
of one row are interleaved, each after a rest and a run that is not counted, and their medians compared. A run during
which other processes were busy is thrown away and repeated. `useful_gflops` counts the sequential run's multiply-adds
only: warm-up and checks count as waste; `matmul_gflops` is what a product of two matrices reaches in the same turns.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from unrecurrent import onednn, run_parallel
from unrecurrent.engines import forget_costs
from unrecurrent.records import make_record, read_records, write_records

STEPS, SIZES, ROUNDS, LEAST = 32_768, (32, 64, 128, 256, 512), 3, 0.1
PRODUCT = 1024  # rows and columns of the matrices whose product is the limit
# Between two kinds of runs: the threads of onnxruntime spin on for a while and would take time from whatever is next.
REST = 0.1
KINDS = {"RNN": (nn.RNN, 1), "GRU": (nn.GRU, 3), "LSTM": (nn.LSTM, 4)}
GATE_ORDER = {"RNN": (0,), "GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2)}  # torch's gates in the order ONNX wants them
SHOWN = ("mode", "chunks", "warmup", "sweeps", "sequential_depth", "max_mismatch", "gain")
PATH = Path(__file__).parents[1] / "results" / "parallel_speed.json"


def main() -> None:
    torch.set_grad_enabled(False)
    kinds = sys.argv[1:] or list(KINDS)
    records = [r for r in (read_records(PATH) if PATH.exists() else []) if r["model"].upper() not in kinds]
    for kind in kinds:
        for size in SIZES:
            records += list(measure(kind, size))
            write_records(PATH, records)
    for variant in ("pilot", "outputs"):
        for baseline in ("torch", "onnxruntime"):
            rows = [r["mean"] for r in records if r["variant"] == variant and r["baseline"] == baseline]
            if rows:
                mean = statistics.geometric_mean(rows)
                print(f"{variant:12} against {baseline:12} geometric mean {mean:.2f} of {len(rows)} rows")


def measure(kind: str, size: int) -> Iterator[dict[str, object]]:
    torch.manual_seed(0)
    module, gates = KINDS[kind][0](size, size), KINDS[kind][1]
    x = torch.randn(STEPS, 1, size)
    session, x_array = onnx_session(kind, module), x.numpy()
    limits = products()
    runs: dict[str, Callable[[], object]] = {
        "torch": lambda: module(x),
        "onnxruntime": lambda: session.run(None, {"x": x_array}),
        "pilot": lambda: run_parallel(module, x),
        "outputs": lambda: run_parallel(module, x, verify="outputs"),
        **limits,
    }
    seconds = interleaved(runs)
    rates = {name: 2 * PRODUCT**3 / seconds[name] / 1e9 for name in limits}
    own = module(x)[0]
    for variant in ("pilot", "outputs"):
        y, _, evidence = runs[variant]()
        gflops = 4 * gates * size * size * STEPS / seconds[variant] / 1e9
        for baseline in ("torch", "onnxruntime"):
            yield make_record(
                command="python benchmarks/parallel_speed.py",
                task="random-sequence",
                model=kind.lower(),
                variant=variant,
                metric="speedup",
                mean=round(seconds[baseline] / seconds[variant], 3),
                seeds=1,
                baseline=baseline,
                hidden_size=size,
                steps=STEPS,
                seconds=round(seconds[variant], 5),
                baseline_seconds=round(seconds[baseline], 5),
                useful_gflops=round(gflops, 1),
                matmul_gflops=round(rates["torch.mm"], 1),
                onednn_gflops=round(rates["oneDNN"], 1),
                largest_error=float((y - own).abs().max()),
                **{name: getattr(evidence, name) for name in SHOWN},
            )
        torch_ratio, onnx_ratio = (seconds[name] / seconds[variant] for name in ("torch", "onnxruntime"))
        print(
            f"{kind:5}{size:4} {variant:8}{1e3 * seconds[variant]:8.1f} ms, torch {torch_ratio:5.1f}x, "
            f"onnxruntime {onnx_ratio:4.1f}x, {gflops:4.0f} of {rates['torch.mm']:.0f} GFLOP/s, {evidence}",
            flush=True,
        )


def interleaved(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each run, taken in turns."""
    undisturbed(lambda: (forget_costs(), runs["pilot"](), runs["pilot"]()))  # its cost model, too, from a quiet machine
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            time.sleep(REST)
            run()
            times[name].append(undisturbed(run))
    return {name: statistics.median(values) for name, values in times.items()}


def undisturbed(run: Callable[[], object]) -> float:
    """Seconds a run takes, from runs during which other processes used next to nothing."""
    for _ in range(300):
        count, others, begun = 0, other_seconds(), time.perf_counter()
        while (taken := time.perf_counter() - begun) < LEAST:
            run()
            count += 1
        taken = time.perf_counter() - begun
        if other_seconds() - others < 0.02 * taken + 0.02:
            return taken / count
        time.sleep(0.2)
    raise SystemExit("other processes keep this machine too busy to measure anything: stop them and try again")


def other_seconds() -> float:
    """Processor seconds used so far on this machine by all but this process."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(fields[:3]) + sum(fields[5:8])
    own = os.times()
    return busy / os.sysconf("SC_CLK_TCK") - own.user - own.system


def products() -> dict[str, Callable[[], object]]:
    """Matrix products that show what the processor can do, taken in turns with the runs since its speed drifts."""
    a, b, c = (torch.randn(PRODUCT, PRODUCT) for _ in range(3))
    packed = onednn.packed(b)
    return {"torch.mm": lambda: torch.mm(a, b, out=c), "oneDNN": lambda: onednn.product(a, packed)}


def onnx_session(kind: str, module: nn.RNNBase) -> onnxruntime.InferenceSession:
    """onnxruntime's own recurrent operator with the module's weights."""
    size = module.hidden_size

    def gates(name: str) -> np.ndarray:
        weight = getattr(module, f"{name}_l0").detach().numpy()
        return np.concatenate([np.split(weight, len(GATE_ORDER[kind]))[gate] for gate in GATE_ORDER[kind]])

    arrays = {
        "W": gates("weight_ih")[None],
        "R": gates("weight_hh")[None],
        "B": np.concatenate([gates("bias_ih"), gates("bias_hh")])[None],
    }
    form = {"linear_before_reset": 1} if kind == "GRU" else {}
    node = helper.make_node(kind, ["x", *arrays], ["y"], hidden_size=size, **form)
    graph = helper.make_graph(
        [node],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, 1, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [STEPS, 1, 1, size])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
