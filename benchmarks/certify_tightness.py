"""How much tighter `certify` is than the plain error propagator: results/certify_tightness.json.

    python benchmarks/certify_tightness.py [CHECKPOINT...]

The plain propagator bounds every factor apart and keeps symmetric bounds on the state; for RNNs the plain bound is the
better of it and the unweighted ‖diag(L) W‖₂. It stands in tests/plain_propagator.py, where `certify` is tested
against it. Measured on contracting cells of 64 units, whose recurrent rows have fixed sums, with inputs of several
scales, and on the trained models of the checkpoints named, for all inputs with ‖x‖_∞ ≤ 1.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from unrecurrent.cells import BoxInput, RNNCell, ScaledGateLSTMCell, build_cells, euclidean_rnn, find_recurrent
from unrecurrent.certificate import Certificate, certify
from unrecurrent.checkpoint import load_model
from unrecurrent.records import command_line, make_record, write_records

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from plain_propagator import PlainLayer, PlainStack, plain_stack

EPS = 1e-2
SIZE = 64
INPUT_BOUND = 0.3
# Row sums of the recurrent weights, gate by gate in torch's order (certified-lstm, the scaled gate: f, z, o).
ROW_SUMS = {"certified-lstm": (0.3, 0.35, 1.2), "gru": (0.5, 0.15, 0.5), "lstm": (0.2, 0.05, 0.1, 0.5)}

Case = tuple[dict[str, Any], PlainStack, Certificate, float]


def synthetic() -> Iterator[Case]:
    torch.manual_seed(0)
    for scale in (0.3, 1.0, 3.0):
        for name, row_sums in ROW_SUMS.items():
            blocks = [
                s * block / block.abs().sum(1, keepdim=True) for s in row_sums for block in [torch.randn(SIZE, SIZE)]
            ]
            weights = scale / 8 * torch.randn(len(row_sums) * SIZE, SIZE), torch.cat(blocks)
            plain, certificate = scaled_gate(*weights) if name == "certified-lstm" else module(name, *weights)
            yield {"model": name, "variant": f"inputs x {scale:g}", "hidden_size": SIZE}, plain, certificate, math.inf


def scaled_gate(weight_ih: Tensor, weight_hh: Tensor) -> tuple[PlainStack, Certificate]:
    ceiling = torch.full((SIZE,), 0.98, dtype=torch.float64)
    reach = INPUT_BOUND * weight_ih.double().abs().sum(1)
    plain = PlainStack([PlainLayer("scaled", [weight_ih, weight_hh], (-reach, reach), ceiling)])
    inputs = BoxInput.bounded(INPUT_BOUND, SIZE)
    return plain, certify(ScaledGateLSTMCell(weight_ih, weight_hh, forget_ceiling=ceiling, inputs=inputs))


def module(name: str, weight_ih: Tensor, weight_hh: Tensor) -> tuple[PlainStack, Certificate]:
    layer = {"gru": nn.GRU, "lstm": nn.LSTM}[name](SIZE, SIZE)
    zeros = torch.zeros(len(weight_hh))
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    layer.load_state_dict(dict(zip(names, (weight_ih, weight_hh, zeros, zeros), strict=True)))
    return plain_stack(layer, INPUT_BOUND), certify(layer, input_bound=INPUT_BOUND)


def trained(folder: Path) -> Case:
    model, config = load_model(folder)
    layer = find_recurrent(model)[0][1]
    cell = build_cells(layer, BoxInput.bounded(1.0, layer.input_size)).cells[0]
    norm = euclidean_rnn(cell).gain if isinstance(cell, RNNCell) else math.inf
    about = {"task": config["task"], "model": config["model"], "hidden_size": layer.hidden_size}
    about["variant"] = f"seed {config['training']['seed']}"
    return about, plain_stack(layer, 1.0), certify(layer, input_bound=1.0), norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="*")
    parser.add_argument("--output", type=Path, default=Path("results/certify_tightness.json"))
    options = parser.parse_args()
    records, table = [], Table("model", "weights", "plain rate", "rate", f"plain horizon({EPS:g})", "horizon")
    for about, plain, certificate, norm in [*synthetic(), *map(trained, options.checkpoints)]:
        before = min(plain.rate()[0], norm), plain.horizon(EPS, steps=60_000)
        after = certificate.rate, certificate.horizon(EPS)
        for way, (rate, horizon) in {"plain propagator": before, "certify": after}.items():
            named = {**about, "variant": f"{about['variant']}, {way}"}
            found = {"mean": rate, "certified_rate": rate, "certified_horizon": horizon}
            records.append(make_record(command=command_line(), metric="certified_rate", **named, **found))
        columns = (f"{before[0]:.5g}", f"{after[0]:.5g}", str(before[1]), str(after[1]))
        table.add_row(about["model"], about["variant"], *columns)
    Console().print(table)
    write_records(options.output, records)


if __name__ == "__main__":
    main()
