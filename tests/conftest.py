"""What all tests share: quiet threads, a data folder, and small tasks that need no data."""

import os
from pathlib import Path

import pytest
import torch

from unrecurrent.tasks.task import Metric, Task, shifted


@pytest.fixture
def data_dir() -> Path:
    """The folder of the benchmark data; tests that need it are skipped where it is not set."""
    named = os.environ.get("UNRECURRENT_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("set UNRECURRENT_DATA to the folder of the benchmark data to run this test")
    return Path(named)


class TinyMusic(Task):
    """Random piano rolls of unequal lengths in which each chord repeats the one two steps before."""

    name = "tiny-music"
    metric = Metric("nll", "lower", "nats a step")
    features = 5
    outputs = 5

    def load(self, split):
        generator = torch.Generator().manual_seed({"train": 1, "valid": 2, "test": 3}[split])
        rolls = []
        for length in (7, 7, 9, 12, 12, 12, 16):
            start = torch.rand(2, 5, generator=generator) < 0.4
            rolls.append(start.repeat(length // 2 + 1, 1)[:length].float())
        return [shifted(roll) for roll in rolls]

    def loss(self, outputs, targets):
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)


class TinyStream(Task):
    """A periodic stream of symbols."""

    name = "tiny-stream"
    metric = Metric("bpc", "lower", "bits a character", scale=1.4426950408889634)
    vocabulary = 6
    outputs = 6
    stream = True

    def load(self, split):
        size = {"train": 1000, "valid": 203, "test": 307}[split]
        return [shifted(torch.arange(size) % 6)]

    def loss(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")


@pytest.fixture
def tiny_music() -> Task:
    return TinyMusic()


@pytest.fixture
def tiny_stream() -> Task:
    return TinyStream()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def story(tmp_path) -> Path:
    """A small text file."""
    path = tmp_path / "story.txt"
    path.write_text("a fox met a crow. " * 80, encoding="utf-8")
    return path
