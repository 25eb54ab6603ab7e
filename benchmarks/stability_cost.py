"""What keeping a model stable costs, as a share of a training step: results/stability_cost.json.

    python benchmarks/stability_cost.py

A step is forward and backward over 35 steps of a batch of 32, a linear readout, and Adam; with fewer parts the share
would be larger, with an embedding and a softmax over words it is smaller. `speedup` is the speed relative to the same
step unconstrained (`baseline`): 0.97 means that staying stable costs 3 %. Ours is timed by itself inside that step,
since it comes after it; parametrizations change the step, so they are timed as steps of their own, interleaved.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import geotorch
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from unrecurrent.records import Record, command_line, make_record, read_records, write_records
from unrecurrent.self_keeping import ADAPT_EVERY
from unrecurrent.speed import timed
from unrecurrent.stability import StableLSTM, StableRNN, stabilize

STEPS, BATCH, WARM_UP = 35, 32, 1
OURS = {
    "certified-rnn": (nn.RNN, {}),
    "certified-gru": (nn.GRU, {"input_bound": 1.0}),
    "certified-lstm-plain": (nn.LSTM, {"input_bound": 1.0}),
    "certified-lstm-coupled": (nn.LSTM, {"input_bound": 1.0, "coupled": True}),
    "stable-rnn": (nn.RNN, {"method": "miller-hardt"}),
    "stable-lstm": (nn.LSTM, {"method": "miller-hardt", "input_bound": 1.0}),
}

#: `rnn` stands for the parametrizations of others
MODELS = [*OURS, "certified-lstm", "rnn"]


def training_step(layer: nn.Module, size: int) -> Callable[[], None]:
    """One step on a task with something to remember; the inputs stay within ±1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(STEPS, BATCH, size, generator=generator) * 2 - 1
    readout = nn.Linear(size, size)
    target = (x.cumsum(0) @ torch.randn(size, size, generator=generator) / size**0.5).tanh()
    optimizer = torch.optim.Adam([*layer.parameters(), *readout.parameters()])

    def step() -> None:
        optimizer.zero_grad()
        ((readout(layer(x)[0]) - target) ** 2).mean().backward()
        optimizer.step()

    return step


def held(size: int, model: str, repeats: int) -> list[float]:
    """Speeds of the constrained step relative to the unconstrained one: step / (step + hold)."""
    torch.manual_seed(0)
    if model == "certified-lstm":
        layer: nn.Module = StableLSTM(size, size)
        step = training_step(layer, size)  # its own hook runs within the step: what it takes is measured again after it
        hold, inside = layer.after_step, True
    else:
        cls, stated = OURS[model]
        layer = cls(size, size)
        constraint = stabilize(layer, **stated)
        step, hold, inside = training_step(layer, size), constraint.hold, False
    if inside:
        inner, spent = hold, []
        layer.after_step = lambda: spent.append(timed(inner))
        steps = [timed(step) for _ in range(repeats + WARM_UP)][WARM_UP:]
        holds = spent[WARM_UP:]
        free = statistics.median(whole - part for whole, part in zip(steps, holds, strict=True))
    else:
        pairs = [(timed(step), timed(hold)) for _ in range(repeats + WARM_UP)][WARM_UP:]
        free, holds = statistics.median(first for first, _ in pairs), [second for _, second in pairs]
    # One step in so many also lets the norm follow the weights; its share of that is spread over the others.
    fits = statistics.median(holds[ADAPT_EVERY - 1 - WARM_UP :: ADAPT_EVERY])
    spread = max(0.0, fits - statistics.median(holds)) / ADAPT_EVERY
    return [free / (free + part + spread) for part in holds]


def above_the_rate(size: int, repeats: int) -> Record:
    """How far ‖W_hh‖₂ lies above the rate after a training step: median and largest of so many."""
    torch.manual_seed(0)
    layer = StableRNN(size, size)
    step, found = training_step(layer, size), []
    for _ in range(repeats):
        step()
        found.append(float(torch.linalg.matrix_norm(layer.weight_hh_l0.detach(), 2)) / layer.rate - 1)
    return make_record(
        command=command_line(), model="certified-rnn", variant="‖W_hh‖₂ above the rate after a step", metric="excess",
        mean=statistics.median(found), largest=max(found), seeds=1, hidden_size=size,
    )  # fmt: skip


def parametrized(size: int, repeats: int) -> dict[str, list[float]]:
    """The same step of an `nn.RNNCell` loop with `weight_hh` parametrized, relative to the same loop without.

    Parametrizations recompute the weight from other parameters; with `nn.RNN` they break its list of flat weights.
    """

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNNCell(size, size)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h, outputs = x.new_zeros(x.shape[1], size), []
            with torch.nn.utils.parametrize.cached():
                for part in x.unbind(0):
                    h = self.cell(part, h)
                    outputs.append(h)
            return torch.stack(outputs), h

    plain, geo, spectral = Loop(), Loop(), Loop()
    geotorch.low_rank(geo.cell, "weight_hh", rank=size)
    spectral_norm(spectral.cell, "weight_hh")
    steps = {"plain": training_step(plain, size), "geotorch": training_step(geo, size)}
    steps["spectral_norm"] = training_step(spectral, size)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            taken = timed(step)
            if turn:
                seconds[name].append(taken)
    free = statistics.median(seconds["plain"])
    return {name: [free / taken for taken in seconds[name]] for name in ("geotorch", "spectral_norm")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--repeats", type=int, default=64)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="records of others are kept")
    parser.add_argument("--output", type=Path, default=Path("results/stability_cost.json"))
    options = parser.parse_args()
    kept = read_records(options.output) if options.output.exists() else []
    records: list[Record] = [record for record in kept if record["model"] not in options.models]
    table = Table("H", "model", "kept stable by", "relative speed")

    def add(size: int, model: str, variant: str, speeds: list[float], baseline: str) -> None:
        median, spread = statistics.median(speeds), statistics.pstdev(speeds)
        records.append(
            make_record(
                command=command_line(), model=model, variant=variant, metric="speedup", mean=median, std=spread,
                seeds=1, baseline=baseline, hidden_size=size,
            )
        )  # fmt: skip
        table.add_row(str(size), model, variant, f"{median:.3f}")

    for size in options.sizes:
        for model in options.models:
            if model == "rnn":
                for name, speeds in parametrized(size, max(3, options.repeats // 16)).items():
                    variant = f"{name} on nn.RNNCell, training step at batch 32 x 35"
                    add(size, model, variant, speeds, "the same loop, unconstrained")
                continue
            variant = "unrecurrent, training step at batch 32 x 35"
            add(size, model, variant, held(size, model, options.repeats), "the same step, unconstrained")
            if model == "certified-rnn":
                records.append(above_the_rate(size, options.repeats))
    write_records(options.output, records)
    Console().print(table)


if __name__ == "__main__":
    main()
