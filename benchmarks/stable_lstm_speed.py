"""How fast `StableLSTM` is beside `nn.LSTM`, forward and backward: results/stable_lstm_speed.json.

    python benchmarks/stable_lstm_speed.py

Both in one process, interleaved, medians, inputs as wide as the layer: batches of 32 x 35, with gradients and without,
and one sequence of 1,000 steps without. `nn.LSTM` runs oneDNN's fused kernels. StableLSTM has three gates instead of
four, hence 3/4 of the multiplications.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from unrecurrent.records import Record, command_line, make_record, write_records
from unrecurrent.stable_lstm import StableLSTM, reference

#: (sequences, steps, with gradients)
CASES = ((32, 35, True), (32, 35, False), (1, 1000, False))


def reference_run(layer: StableLSTM, batch: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The plain step-by-step run of the same layer."""

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        zero = x.new_zeros(batch, layer.hidden_size)
        return reference(x, *layer._weights(0), zero, zero)

    return run


def seconds_each(size: int, repeats: int, batch: int, steps: int, backward: bool) -> dict[str, list[float]]:
    torch.manual_seed(0)
    x = torch.randn(steps, batch, size, requires_grad=backward)
    layer = StableLSTM(size, size)
    runs = {"nn.LSTM": nn.LSTM(size, size), "certified-lstm": layer, "reference": reference_run(layer, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            with torch.set_grad_enabled(backward):
                y = run(x)[0]
            if backward:
                y.sum().backward()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("results/stable_lstm_speed.json"))
    options = parser.parse_args()
    records: list[Record] = []
    table = Table("H", "what", "run", "ms", "speed relative to nn.LSTM")
    for size in options.sizes:
        for batch, steps, backward in CASES:
            what = f"{'forward and backward' if backward else 'forward'}, batch {batch} x {steps}"
            seconds = seconds_each(size, options.repeats, batch, steps, backward)
            base = statistics.median(seconds.pop("nn.LSTM"))
            for name, taken in seconds.items():
                ratios = [base / t for t in taken]
                variant = what + (", plain reference" if name == "reference" else "")
                records.append(
                    make_record(
                        command=command_line(), model="certified-lstm", variant=variant, metric="speedup",
                        mean=statistics.median(ratios), std=statistics.pstdev(ratios), seeds=1, baseline="nn.LSTM",
                        hidden_size=size,
                    )
                )  # fmt: skip
                milliseconds = f"{1e3 * statistics.median(taken):.1f} / {1e3 * base:.1f}"
                table.add_row(str(size), what, name, milliseconds, f"{statistics.median(ratios):.2f}")
    write_records(options.output, records)
    Console().print(table)


if __name__ == "__main__":
    main()
