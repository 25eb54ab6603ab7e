"""How long the memory profile of an H = 256 LSTM on 100,000 steps takes, and how much memory.

Writes results/profile_speed.json:

    python benchmarks/profile_speed.py

Truncation up to 2,048 inputs at 128 and at 1,024 (the default) sampled positions, gradients, forgetting, local rates
and 16 exponents over 10,000 steps. Memory is what the process grew by at its peak; with `--steps` another length of
data can be given, to see that it does not grow with them (but for the data themselves).
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from unrecurrent import measure_memory
from unrecurrent.records import Record, command_line, make_record, write_records

ROOT = Path(__file__).resolve().parent.parent
HIDDEN, FEATURES = 256, 16
#: sampled positions of the truncation curve: few, and as many as by default
POSITIONS = (128, 1024)


class Predictor(nn.Module):
    """An LSTM and a linear readout, with nothing that this package would know of."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, HIDDEN, batch_first=True)
        self.readout = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.lstm(x)[0])


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(-1)


def measure(steps: int, positions: int, results: "multiprocessing.Queue[tuple[float, float]]") -> None:
    """Put the seconds and the MiB that a profile on `steps` steps takes."""
    torch.manual_seed(0)
    model = Predictor()
    with torch.no_grad():  # a layer that never forgets: no window length settles anything early
        model.lstm.bias_ih_l0[HIDDEN : 2 * HIDDEN] += 4
    x = torch.randn(steps, FEATURES)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    profile = measure_memory(model, [(x, x.roll(-1, 0))], squared, positions=positions, progress=True)
    seconds = time.perf_counter() - start
    results.put((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))
    print(profile)


def row(steps: int, positions: int) -> Record:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[tuple[float, float]] = context.Queue()
    process = context.Process(target=measure, args=(steps, positions, results))
    process.start()
    seconds, mebibytes = results.get()
    process.join()
    return make_record(
        command=command_line(), task="random inputs", model="lstm",
        variant=f"profile of {steps:,} steps, {positions:,} positions",
        metric="seconds", split=None, mean=round(seconds, 2), std=None, seeds=1, hidden_size=HIDDEN,
        positions=positions, peak_memory_mib=round(mebibytes, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[100_000])
    parser.add_argument("--out", type=Path, default=ROOT / "results/profile_speed.json")
    arguments = parser.parse_args()
    records = [row(steps, positions) for steps in arguments.steps for positions in POSITIONS]
    for record in records:
        print(f"{record['variant']}: {record['mean']} s, {record['peak_memory_mib']} MiB")
    write_records(arguments.out, records)


if __name__ == "__main__":
    main()
