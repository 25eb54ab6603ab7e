"""Every example runs as a newcomer would run it, and so does all Python the README shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import unrecurrent as ur

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README_BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


class Repeater(nn.Module):
    """A causal model of one number a step."""

    def __init__(self):
        super().__init__()
        self.lstm, self.readout = nn.LSTM(1, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.readout(self.lstm(x)[0])


def readers_own():
    """What a reader has at hand: a model and its data, a layer with its optimizer, table, inputs and start state."""
    lstm, series = nn.LSTM(16, 32), torch.randn(300, 1)
    return {
        "ur": ur,
        "model": Repeater(),
        "sequences": [(series[:-1], series[1:])],
        "loss_fn": lambda output, target: (output - target).square().sum(-1),
        "lstm": lstm,
        "optimizer": torch.optim.Adam(lstm.parameters()),
        "table": nn.Embedding(50, 16),
        "x": torch.rand(200, 1, 16),
        "h0": (torch.zeros(1, 1, 32), torch.zeros(1, 1, 32)),
    }


def test_the_readme_shows_python():
    assert len(README_BLOCKS) == 5


def quickly(compare):
    """The same comparison at a size that takes seconds."""
    return lambda *given, **asked: compare(
        *given, **asked | {"seeds": 1, "parameters": 20_000, "epochs": 0.05, "positions": 32, "progress": False}
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(README_BLOCKS)))
def test_python_in_the_readme_runs(number, tmp_path, monkeypatch, request):
    block = README_BLOCKS[number]
    if "compare(" in block:
        request.getfixturevalue("data_dir")  # skips where the chorales are not at hand
    monkeypatch.setattr(ur, "compare", quickly(ur.compare))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"README.md, block {number + 1}", "exec"), readers_own())
