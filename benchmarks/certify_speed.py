"""How long `certify` takes on one layer, and how much memory: results/certify_speed.json.

    python benchmarks/certify_speed.py

Each layer is measured in a process of its own, so that the peak memory is its own; three kinds of weights: those torch
starts with, for which the search for a rate ends soon, contracting ones, for which it is longest, and for the LSTMs
ones that forget slowly, at a rate near 1. Memory is what the process grew by at its peak; horizons are for 0.01.
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

from unrecurrent.cells import CoupledLSTMCell
from unrecurrent.certificate import certify
from unrecurrent.records import command_line, make_record, write_records
from unrecurrent.stable_lstm import StableLSTM

MODELS = {"rnn": nn.RNN, "lstm": nn.LSTM, "coupled-lstm": nn.LSTM, "gru": nn.GRU, "stable-lstm": StableLSTM}
SLOW = "slow forgetting"
VARIANTS = {"as initialised": None, "row sums 0.05": 0.05, SLOW: 2e-4}


def prepare(model: str, hidden_size: int, variant: str) -> nn.Module:
    torch.manual_seed(0)
    row_sum, slow = VARIANTS[variant], variant == SLOW
    layer = MODELS[model](hidden_size, hidden_size, **({"rate": 0.9995} if slow and model == "stable-lstm" else {}))
    with torch.no_grad():
        for block in layer.weight_hh_l0.split(hidden_size) if row_sum is not None else ():
            block.mul_(row_sum / block.abs().sum(1, keepdim=True))
        if slow:
            layer.weight_ih_l0.mul_(0.1)
            gate = 0 if model == "stable-lstm" else 1
            layer.bias_ih_l0.view(-1, hidden_size)[gate] = 7 * torch.rand(hidden_size)
        if model == "coupled-lstm":
            for parameter in layer.parameters():
                parameter[:hidden_size] = -parameter[hidden_size : 2 * hidden_size]
    return layer


def variants(model: str) -> list[str]:
    return [variant for variant in VARIANTS if variant != SLOW or "lstm" in model]


def measure(model: str, hidden_size: int, variant: str, repeats: int) -> dict[str, Any]:
    layer = prepare(model, hidden_size, variant)
    inputs = 0.3 * torch.randn(35, 32, hidden_size)
    certify(nn.RNN(2, 2))
    before = _peak_mib()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        certificate = certify(layer, inputs=inputs)
        assert isinstance(certificate.cell.cells[0], CoupledLSTMCell) == (model == "coupled-lstm")
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
            for variant in variants(model):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(measure, (model, size, variant, options.repeats))
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
