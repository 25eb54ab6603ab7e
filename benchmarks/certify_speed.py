"""How long `certify` takes on one layer, and how much memory: results/certify_speed.json.

    python benchmarks/certify_speed.py

Each layer is measured in a process of its own, so that the peak memory is its own; two kinds of weights: those torch
starts with, for which the search for a rate ends soon, and contracting ones, for which it is longest. Memory is what
the process grew by at its peak; horizons are for 0.01.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from unrecurrent.certificate import certify
from unrecurrent.records import command_line, make_record, write_records

MODELS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
VARIANTS = {"as initialised": None, "row sums 0.05": 0.05}


def prepare(model: str, hidden_size: int, row_sum: float | None) -> nn.Module:
    torch.manual_seed(0)
    layer = MODELS[model](hidden_size, hidden_size)
    if row_sum is not None:
        with torch.no_grad():
            for block in layer.weight_hh_l0.split(hidden_size):
                block.mul_(row_sum / block.abs().sum(1, keepdim=True))
    return layer


def measure(model: str, hidden_size: int, row_sum: float | None, repeats: int) -> dict[str, Any]:
    layer = prepare(model, hidden_size, row_sum)
    inputs = 0.3 * torch.randn(35, 32, hidden_size)
    certify(nn.RNN(2, 2))
    before = _peak_mib()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        certificate = certify(layer, inputs=inputs)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    horizon = certificate.horizon(1e-2)
    return {
        "seconds": seconds,
        "horizon_seconds": time.perf_counter() - started,
        "added_mib": _peak_mib() - before,
        "certified_rate": certificate.rate,
        "certified_horizon": horizon,
    }


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/certify_speed.json"))
    options = parser.parse_args()
    records, table = [], Table("layer", "H", "weights", "certify, s", "horizon, s", "memory, MiB", "rate")
    for size in options.sizes:
        for model in MODELS:
            for variant, row_sum in VARIANTS.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(measure, (model, size, row_sum, options.repeats))
                seconds = statistics.median(found["seconds"])
                common = {
                    "command": command_line(),
                    "model": model,
                    "variant": variant,
                    "hidden_size": size,
                    "certified_rate": found["certified_rate"],
                    "certified_horizon": found["certified_horizon"],
                    "peak_memory_mib": found["added_mib"],
                }
                spread = statistics.stdev(found["seconds"]) if options.repeats > 1 else None
                records.append(make_record(**common, metric="certify_seconds", mean=seconds, std=spread))
                records.append(make_record(**common, metric="horizon_seconds", mean=found["horizon_seconds"]))
                table.add_row(
                    model,
                    str(size),
                    variant,
                    f"{seconds:.3f}",
                    f"{found['horizon_seconds']:.3f}",
                    f"{found['added_mib']:.0f}",
                    f"{found['certified_rate']:.4g}",
                )
    Console().print(table)
    write_records(options.output, records)


if __name__ == "__main__":
    main()
