"""MNIST pixel by pixel: files, order, one answer a sequence, and a comparison from end to end."""

import gzip
import struct

import numpy as np
import pytest
import torch

import unrecurrent as ur
from unrecurrent import data
from unrecurrent.errors import InputError
from unrecurrent.tasks import SPLITS, get_task
from unrecurrent.tasks.mnist import PermutedMNIST


def write_idx(path, array):
    path.parent.mkdir(exist_ok=True)
    header = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_mnist(folder, train=24, test=7):
    """Images that are told apart by how bright they are."""
    for stem, count in (("train", train), ("t10k", test)):
        labels = np.arange(count) % 10
        images = np.broadcast_to((25 * labels)[:, None, None], (count, 28, 28)).copy()
        images[:, 0, :2] = 255
        write_idx(folder / f"mnist/{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"mnist/{stem}-labels-idx1-ubyte.gz", labels)


def test_the_files_have_the_published_counts(data_dir):
    if not (data_dir / "mnist").is_dir():
        pytest.skip("mnist is not in the data folder")
    assert [file.state for file in data.check("mnist", data_dir)] == ["ready"] * 4
    task = get_task("mnist", data_dir=data_dir)
    loaded = {split: task.load(split) for split in SPLITS}
    assert [len(loaded[split]) for split in SPLITS] == [55_000, 5_000, 10_000]
    assert loaded["train"][0].inputs.shape == (784, 1)
    assert [int(e.targets[-1]) for e in loaded["train"][:6]] == [5, 0, 4, 1, 9, 2]
    assert float(max(e.inputs.max() for e in loaded["test"][:50])) == 1


def test_pixels_are_read_row_by_row_and_the_last_twelfth_validates(tmp_path):
    write_mnist(tmp_path)
    task = get_task("mnist", data_dir=tmp_path)
    assert [len(task.load(split)) for split in SPLITS] == [22, 2, 7]
    example = task.load("valid")[1]
    assert example.inputs[:3, 0].tolist() == pytest.approx([1, 1, 75 / 255])
    assert int(example.targets[-1]) == 3
    assert task.mask(example).nonzero().tolist() == [[783]]


def test_the_permutation_is_the_same_for_everybody(tmp_path):
    write_mnist(tmp_path)
    assert PermutedMNIST.order[:8].tolist() == [693, 85, 647, 392, 765, 14, 299, 711]
    assert sorted(PermutedMNIST.order) == list(range(784))
    plain, permuted = (get_task(name, data_dir=tmp_path).load("test")[2].inputs for name in ("mnist", "permuted-mnist"))
    assert torch.equal(plain[PermutedMNIST.order], permuted)
    assert not torch.equal(plain, permuted)


def test_a_changed_image_is_other_data(tmp_path):
    write_mnist(tmp_path)
    digests = [get_task(name, data_dir=tmp_path).digest() for name in ("mnist", "permuted-mnist")]
    write_mnist(tmp_path, test=8)
    digests += [get_task(name, data_dir=tmp_path).digest() for name in ("mnist", "permuted-mnist")]
    assert len(set(digests)) == 4


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("train-images-idx3-ubyte", b"<html>not found</html>", "no whole gzip file"),
        ("train-images-idx3-ubyte", None, "no whole gzip file"),
        ("train-images-idx3-ubyte", gzip.compress(b""), "no idx file"),
        ("train-labels-idx1-ubyte", gzip.compress(struct.pack(">4i", 0x0803, 1, 28, 28) + bytes(784)), "no idx file"),
        (
            "train-labels-idx1-ubyte",
            gzip.compress(struct.pack(">2i", 0x0801, 24) + bytes(20)),
            "another number",
        ),
        (
            "train-labels-idx1-ubyte",
            gzip.compress(struct.pack(">2i", 0x0801, 23) + bytes(23)),
            "24 images but 23",
        ),
        ("train-labels-idx1-ubyte", gzip.compress(struct.pack(">2i", 0x0801, 24) + bytes([11] * 24)), "holds? 11"),
    ],
    ids=["page", "missing", "empty", "images for labels", "four short", "one short", "label 11"],
)
def test_damaged_files_are_one_sentence(file, content, words, tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "mnist" / f"{file}.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError, match=words) as error:
        get_task("mnist", data_dir=tmp_path).load("train")
    assert "\n" not in str(error.value)
    assert data.check("mnist", tmp_path)[0].state == "damaged"


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="unrecurrent data get permuted-mnist"):
        get_task("permuted-mnist", data_dir=tmp_path).load("test")


def test_a_comparison_judged_by_accuracy_runs_from_end_to_end(tmp_path):
    write_mnist(tmp_path, test=3)
    found = ur.compare(
        "mnist",
        models=["rnn", "window:k=2"],
        seeds=1,
        parameters=2_000,
        epochs=1,
        data_dir=tmp_path,
        folder=tmp_path / "runs",
        positions=3,
        progress=False,
    )
    assert found.budget["tokens read"] == 22 * 784
    for record, entry in zip(found.records, found.entries, strict=True):
        accuracies = [result["test_metric"] for result in entry.results]
        assert record["metric"] == "acc"
        assert record["mean"] == pytest.approx(accuracies[0])
        assert all(0 <= a <= 100 and a * 3 == pytest.approx(100 * round(a * 3 / 100)) for a in accuracies)
    assert found.to_dict()["metric"] == {"name": "acc", "direction": "higher", "unit": "percent"}
    assert "higher is better" in found.table
    assert "percent" in found.verdict.text
    found.save_report(tmp_path / "report.html")
