"""Multi30k: the published counts, text that survives the vocabulary, BLEU, and damaged files."""

import gzip
import json

import pytest
import torch

from command import run
from unrecurrent.beam_search import translate
from unrecurrent.errors import InputError
from unrecurrent.measuring import measure_checkpoint
from unrecurrent.models import Interface, build_model
from unrecurrent.speed import timers_of
from unrecurrent.tasks import get_task
from unrecurrent.tasks.translation import BEGIN, END, bleu
from unrecurrent.training import TrainingConfig, TrainingRun, assess, scored_batches, task_interface, word_counts

GERMAN = ["Ein Hund läuft.", "Eine Katze schläft.", "Ein Mann läuft, schnell.", "Eine Frau schläft."]
ENGLISH = ["A dog runs.", "A cat sleeps.", "A man runs, fast.", "A woman sleeps."]


def write_pairs(folder, count):
    """Write the first few pairs in the true file format, those to train on eight times."""
    home = folder / "multi30k"
    home.mkdir()
    for file in ("train", "val", "test_2016_flickr"):
        for language, lines in (("de", GERMAN), ("en", ENGLISH)):
            text = "\n".join(lines[:count] * (8 if file == "train" else 1)) + "\n"
            (home / f"{file}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.fixture
def few(tmp_path):
    return write_pairs(tmp_path, 4)


def test_the_corpus_has_its_published_counts(data_dir):
    task = get_task("multi30k", data_dir=data_dir)
    assert [sum(1 for _ in task.sentences(split)) for split in ("train", "valid", "test")] == [29_000, 1_014, 1_000]


def test_a_pair_is_one_sequence_whose_second_half_counts(few):
    task = get_task("multi30k", data_dir=few)
    inputs, targets = task.load("test")[2]
    cut = inputs.tolist().index(BEGIN)
    assert task.tokenizer.decode(inputs[:cut].tolist()) == GERMAN[2]
    counted = targets[task.mask(task.load("test")[2])]
    assert counted[-1] == END
    assert task.tokenizer.decode(counted[:-1].tolist()) == ENGLISH[2]
    assert task.load("test").references[2] == ENGLISH[2]
    assert len(task.load("train")) == 32
    assert torch.equal(task.load("train")[-1].inputs, task.load("train")[31].inputs)
    assert get_task("multi30k", data_dir=few).digest() == task.digest()


def test_words_are_counted_where_they_are_predicted(few):
    task = get_task("multi30k", data_dir=few)
    examples = task.load("train")
    counts = word_counts(task, examples)
    assert int(counts.sum()) == sum(int(task.mask(example).sum()) for example in examples)
    assert counts[END] == len(examples)


def test_a_model_that_has_learnt_them_writes_the_translations(tmp_path):
    task = get_task("multi30k", data_dir=write_pairs(tmp_path, 2))
    config = TrainingConfig(epochs=8, learning_rate=5e-3, batch_size=2)
    run = TrainingRun(task, "seq2seq-conv", {"hidden_size": 24, "embedding_size": 16}, config)
    model = run.run()
    assert run.progress.history[0]["valid_metric"] < 90
    assert assess(model, task, task.load("test")).metric == pytest.approx(100)
    assert translate(model, task, [GERMAN[1], GERMAN[0]]) == [ENGLISH[1], ENGLISH[0]]


def test_a_model_of_one_sequence_is_scored_on_the_same_steps(few):
    task = get_task("multi30k", data_dir=few)
    model = build_model("gru", task_interface(task), {"hidden_size": 4})
    with torch.no_grad():
        model.readout.weight.zero_()
        model.readout.bias.zero_()
    assert assess(model, task, task.load("test")).loss == pytest.approx(torch.tensor(float(task.vocabulary)).log())


def test_a_checkpoint_is_certified_layer_by_layer_and_not_measured(few, tmp_path, capsys, monkeypatch):
    task, folder = get_task("multi30k", data_dir=few), tmp_path / "run"
    settings = {"hidden_size": 8, "embedding_size": 8, "rate": 0.9}
    TrainingRun(task, "certified-seq2seq-lstm", settings, TrainingConfig(epochs=1, batch_size=8), folder).run()
    code, out, _ = run(capsys, monkeypatch, "certify", folder, "--json")
    assert code == 0
    proofs = json.loads(out)
    assert set(proofs) == {"reader", "reader backwards", "asker", "writer"}
    assert all(proof["rate"] <= 0.9 + 1e-6 for proof in proofs.values())
    assert run(capsys, monkeypatch, "certify", folder, "--input-bound", "1")[0] == 2
    with pytest.raises(InputError, match="two parts"):
        measure_checkpoint(folder, data_dir=few)


def test_control_symbols_in_a_text_are_text(few):
    task = get_task("multi30k", data_dir=few)
    model = build_model("seq2seq-conv", task_interface(task), {"hidden_size": 8, "embedding_size": 8}).eval()
    assert len(translate(model, task, ["Ein <s> Hund", "Ein Hund <s>", "<pad> </s>"])) == 3
    assert not {0, BEGIN, END} & set(task.tokenizer.encode("Ein <s> </s> <pad> Hund").ids)


def test_a_model_of_other_symbols_does_not_translate(few):
    task = get_task("multi30k", data_dir=few)
    other = build_model("seq2seq-conv", Interface(9, None, 9, 2), {"hidden_size": 8, "embedding_size": 8})
    with pytest.raises(InputError, match="other symbols"):
        translate(other, task, ["Ein Hund"])
    with pytest.raises(InputError, match="a list of sentences"):
        translate(other, task, "Ein Hund")


def test_generation_is_timed_behind_the_separator(few):
    task = get_task("multi30k", data_dir=few)
    model = build_model("seq2seq-conv", task_interface(task), {"hidden_size": 8, "embedding_size": 8})
    batch = next(scored_batches(task, task.load("valid")))
    timer = timers_of(model, task, batch, batch, TrainingConfig(batch_size=2))[2]
    read, step = [], type(model).step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "step", lambda self, x, cache: (read.append(int(x)), step(self, x, cache))[1])
        patch.setattr(type(model), "encode", lambda *_: pytest.fail("the source was read while timed"))
        timer()
    row = batch.targets[0]
    assert read == (row[batch.mask[0]].tolist() * 32)[:32]


def test_bleu_is_that_of_the_corpus():
    assert bleu(ENGLISH, ENGLISH) == pytest.approx(100)
    assert 0 < bleu(["A dog runs fast over grass."], ["A dog runs fast over snow."]) < 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "no gzip file"),
        (gzip.compress(b"one line\n"), "hold 1 German sentences but 4 English"),
        (gzip.compress(b""), "holds no sentence"),
    ],
    ids=["damaged", "too short", "empty"],
)
def test_other_files_get_one_sentence(few, content, message):
    (few / "multi30k" / "val.de.gz").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(get_task("multi30k", data_dir=few).sentences("valid"))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r"multi30k.*missing.*train.de.gz"):
        list(get_task("multi30k", data_dir=tmp_path).sentences("train"))


def test_wmt14_reads_the_parquet_files_of_the_hub(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "wmt14" / "de-en"
    folder.mkdir(parents=True)
    for name, pairs in (
        ("train-00000-of-00002", list(zip(GERMAN[:2], ENGLISH[:2], strict=True)) * 9),
        ("train-00001-of-00002", list(zip(GERMAN[2:], ENGLISH[2:], strict=True)) * 9),
        ("validation-00000-of-00001", [(GERMAN[0], ENGLISH[0])]),
        ("test-00000-of-00001", [(GERMAN[3], ENGLISH[3] + " ")]),
    ):
        table = pyarrow.table({"translation": [{"de": german, "en": english} for german, english in pairs]})
        parquet.write_table(table, folder / f"{name}.parquet")
    task = get_task("wmt14", data_dir=tmp_path)
    assert [len(task.load(split)) for split in ("train", "valid", "test")] == [36, 1, 1]
    assert task.load("test").references == [ENGLISH[3]]
    assert not task.load("train").references
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="no Parquet file of pairs"):
        list(task.sentences("test"))
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(InputError, match=r"test-00000-of-00001.parquet of 'wmt14' is missing"):
        list(task.sentences("test"))
    (folder / "train-00001-of-00002.parquet").rename(folder / "train-00001-of-00003.parquet")
    with pytest.raises(InputError, match=r"train-00001-of-00002.parquet of 'wmt14' is missing"):
        list(task.sentences("train"))
