"""ATIS: words in, tags out, judged by whole slots."""

import sys

import pytest
import torch

from unrecurrent import data
from unrecurrent.errors import InputError
from unrecurrent.tasks import SPLITS, get_task
from unrecurrent.tasks.atis import slot_f1

LINES = {
    "atis-2.train": "BOS to new york at 838 EOS\tO O B-city I-city O B-time O\nBOS to denver EOS\tO O B-city O\n",
    "atis-2.dev": "BOS from boston EOS\tO O B-city O\n",
    "atis.test": "BOS at 12 with delta EOS\tO O B-time O B-airline O\n",
}


def write_atis(folder, **changed):
    (folder / "atis").mkdir()
    for file, lines in (LINES | changed).items():
        (folder / "atis" / f"{file}.iob").write_text(lines, encoding="utf-8")
    return get_task("atis", data_dir=folder)


def test_the_files_have_the_published_counts(data_dir):
    if not (data_dir / "atis").is_dir():
        pytest.skip("atis is not in the data folder")
    assert [file.state for file in data.check("atis", data_dir)] == ["ready"] * 3
    task = get_task("atis", data_dir=data_dir)
    assert [len(task.load(split)) for split in SPLITS] == [4_478, 500, 893]
    assert task.outputs == 127
    assert [sum(len(e.inputs) for e in task.load(split)) for split in SPLITS] == [50_497, 5_703, 9_164]
    gold = [e.targets for e in task.load("test")]
    assert task.judge(gold, gold) == 100.0
    outside = [torch.full_like(row, task.tags.index("O")) for row in gold]
    assert task.judge(outside, gold) == 0.0


def test_words_come_from_training_and_tags_from_all(tmp_path):
    task = write_atis(tmp_path)
    assert task.words == ["<unk>", "to", "DIGITDIGITDIGIT", "at", "denver", "new", "york"]
    assert task.tags == ["B-airline", "B-city", "B-time", "I-city", "O"]
    assert (task.vocabulary, task.outputs) == (7, 5)
    example = task.load("test")[0]
    assert [task.words[i] for i in example.inputs] == ["at", "<unk>", "<unk>", "<unk>"]
    assert [task.tags[i] for i in example.targets] == ["O", "B-time", "O", "B-airline"]
    assert task.mask(example) is None


@pytest.mark.parametrize(
    ("predicted", "f1"),
    [
        (["B-city", "I-city", "O", "B-time"], 100.0),
        (["B-city", "O", "O", "B-time"], 50.0),  # half a slot is no slot
        (["B-city", "I-city", "O", "B-city"], 50.0),  # nor is one of another kind
        (["B-city", "I-city", "B-time", "B-time"], 80.0),  # 2 of 3 found are right, 2 of 2 wanted are found
        (["O", "O", "O", "O"], 0.0),
    ],
)
def test_whole_slots_are_judged(predicted, f1):
    assert slot_f1([["B-city", "I-city", "O", "B-time"]], [predicted]) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "is empty"),
        ("BOS to den", "3 words but 0 tags"),
        ("BOS to denver EOS\tO O\n", "4 words but 2 tags"),
        ("to denver now\tO B-city O\n", "not BOS, words, EOS"),
        ("BOS to denver EOS\tO O city O\n", "neither O nor B"),
    ],
)
def test_damaged_files_are_one_sentence(lines, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        write_atis(tmp_path, **{"atis-2.dev": lines}).load("valid")
    assert "atis-2.dev.iob" in str(error.value)
    assert {file.state for file in data.check("atis", tmp_path)} == {"damaged"}


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="unrecurrent data get atis"):
        get_task("atis", data_dir=tmp_path).load("test")


def test_without_seqeval_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(InputError, match=r"unrecurrent\[slots\]"):
        slot_f1([["O"]], [["O"]])
