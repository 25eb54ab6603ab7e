"""`copy` and `adding`: the sequences of the literature, the same on every machine."""

import math

import pytest
import torch

from unrecurrent import data
from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError
from unrecurrent.tasks import get_task


@pytest.fixture
def few(monkeypatch):
    """Only a few sequences a split: those of the full task would take seconds to draw."""
    for name in ("copy_memory.CopyTask", "adding.AddingTask"):
        monkeypatch.setattr(f"unrecurrent.tasks.{name}.sizes", {"train": 40, "valid": 20, "test": 20})


def test_lengths_are_those_of_the_literature_where_none_is_given():
    assert (get_task("copy").name, get_task("adding").name) == ("copy:T=1000", "adding:T=600")
    assert get_task("copy:T=1000").name == get_task("copy").name
    assert len(get_task("copy:T=500").load("test")) == 1_000
    assert len(get_task("copy:T=500").load("test")[0].inputs) == 520


@pytest.mark.parametrize("name", ["copy:", "copy:500", "copy:T=0", "adding:T=1", "adding:T=many", "adding:N=5"])
def test_a_length_that_cannot_be_read_is_one_sentence(name):
    with pytest.raises(InputError, match=r"write (copy|adding):T=LENGTH"):
        get_task(name)


def test_who_reads_nothing_gets_the_published_levels():
    assert get_task("copy:T=1000").chance == pytest.approx(0.0204, abs=5e-5)
    assert get_task("adding:T=600").chance == pytest.approx(1 / 6, rel=0.05)


def test_copy_asks_for_its_first_ten_symbols(few):
    for inputs, targets in get_task("copy:T=30").load("train"):
        assert len(inputs) == len(targets) == 50
        assert torch.equal(targets[-10:], inputs[:10])
        assert 1 <= int(inputs[:10].min()) <= int(inputs[:10].max()) <= 8
        assert inputs[10:39].tolist() == [0] * 29
        assert inputs[39:].tolist() == [9] * 11
        assert targets[:40].tolist() == [0] * 40


def test_copy_is_scored_over_all_steps_as_published():
    task = get_task("copy:T=1000")
    example = task.load("valid")[0]
    memoryless = torch.full((1, 1020, 10), -1e4)
    memoryless[:, :1010, 0] = 0
    memoryless[:, 1010:, 1:9] = 0
    loss = task.loss(memoryless, example.targets[None])
    assert task.metric.of(float(loss.mean())) == pytest.approx(10 * math.log(8) / 1020)
    assert task.mask(example) is None


def test_adding_marks_two_numbers_and_asks_for_their_sum(few):
    task = get_task("adding:T=17")
    for example in task.load("train"):
        numbers, marks = example.inputs.unbind(-1)
        assert marks.sum() == 2
        assert set(marks.tolist()) == {0.0, 1.0}
        assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1
        assert torch.allclose(example.targets[-1, 0], numbers[marks == 1].sum())
        assert task.mask(example).nonzero().tolist() == [[16]]


def test_marks_of_adding_may_stand_anywhere(few):
    marks = torch.stack([e.inputs[:, 1] for e in get_task("adding:T=3").load("train")])
    assert (marks.sum(0) > 15).all()


def test_saying_one_costs_a_sixth():
    examples = get_task("adding:T=20").load("test")
    sums = torch.stack([e.targets[-1] for e in examples])
    loss = get_task("adding").loss(torch.ones(len(sums), 1, 1), sums[:, None])
    assert float(loss.mean()) == pytest.approx(1 / 6, rel=0.1)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("copy:T=5", "87090fa0b416ae727ee292450566b12574f0ff15586f0eaf7b78b41fdc84b4a0"),
        ("adding:T=5", "40ff5930080d1b841b5a41ec593f46d03d6e27273c97f0c73e412504e3cf7650"),
    ],
)
def test_sequences_are_the_same_on_every_machine(name, digest, few):
    assert get_task(name).digest() == get_task(name).digest() != get_task(f"{name}0").digest()
    found = tensor_digest(("", tensor) for example in get_task(name).load("train") for tensor in example)
    assert found == digest


def test_splits_and_lengths_differ(few):
    task, longer = get_task("copy:T=5"), get_task("copy:T=6")
    first = {tuple(t.load(s)[0].inputs[:10].tolist()) for t in (task, longer) for s in ("train", "valid", "test")}
    assert len(first) == 6


def test_there_is_nothing_to_get_or_check():
    assert not any(file.task.startswith(("copy", "adding")) for file in data.listing())
    with pytest.raises(InputError, match="drawn from a seed"):
        data.fetch("copy")
    with pytest.raises(InputError, match="drawn from a seed"):
        data.check("adding:T=200")
