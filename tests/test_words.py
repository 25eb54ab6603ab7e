"""Word-level tasks: the standard files, their vocabulary, every word predicted, nothing held that need not be."""

import math

import pytest
import torch

from unrecurrent import InputError
from unrecurrent.models import build_model
from unrecurrent.recipes import default_parameters, find_recipe
from unrecurrent.task_memory import measure_on_task, memory_data
from unrecurrent.tasks import Metric, get_task
from unrecurrent.training import TrainingConfig, TrainingRun, evaluate, task_interface, word_counts

LINES = {
    "train": " \n = Title = \n\n the cat sat on the <unk> mat . \n the dog sat . \n" * 30,
    "valid": " \n = Title = \n the dog sat on the cat . \n" * 8,
    "test": " the cat sat on the mat . \n\n the dog <unk> . \n" * 8,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("UNRECURRENT_CACHE", str(tmp_path / "cache"))
    for folder, pattern in (
        ("wikitext-2", "wiki.{}.tokens"),
        ("wikitext-103", "wiki.{}.tokens"),
        ("ptb", "ptb.{}.txt"),
    ):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for split, text in LINES.items():
            (tmp_path / "data" / folder / pattern.format(split)).write_text(text, encoding="utf-8")
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103", "ptb"])
def test_every_word_of_a_split_is_predicted_once(home, name):
    task = get_task(name, data_dir=home)
    for split, text in LINES.items():
        expected = [word for line in text.splitlines() for word in [*line.split(), "<eos>"]]
        ((inputs, targets),) = task.load(split)
        assert [task.words[i] for i in targets] == expected
        assert [task.words[i] for i in inputs] == ["<eos>", *expected[:-1]]
    assert task.words[0] == "<eos>"  # the most frequent
    assert task.vocabulary == task.outputs == len(set(LINES["train"].split())) + 1


def test_a_changed_text_is_read_again(home):
    before = get_task("ptb", data_dir=home).digest()
    path = home / "ptb/ptb.valid.txt"
    path.write_text(" the cat . \n" * 20, encoding="utf-8")
    task = get_task("ptb", data_dir=home)
    assert task.digest() != before
    assert len(task.load("valid")[0].targets) == 80


def test_words_outside_the_vocabulary_are_refused_or_unknown(home):
    task = get_task("ptb", data_dir=home)
    path = home / "mine.txt"
    path.write_text("the zebra sat\n", encoding="utf-8")
    assert [task.words[i] for i in task.encode(path).targets] == ["the", "<unk>", "sat", "<eos>"]
    for split in ("train", "valid", "test"):
        whole = home / f"ptb/ptb.{split}.txt"
        whole.write_text(whole.read_text().replace("<unk>", "cat") + (" zebra \n" if split == "test" else ""))
    with pytest.raises(InputError, match="'zebra', which is not in the training text of 'ptb'"):
        get_task("ptb", data_dir=home).load("test")


def test_a_missing_file_says_where_to_put_it(home):
    (home / "ptb/ptb.test.txt").unlink()
    with pytest.raises(InputError, match=r"the data of 'ptb' are missing: run `unrecurrent data get ptb`"):
        get_task("ptb", data_dir=home).load("train")


def test_billion_word_reads_its_shards_and_drops_rare_words(tmp_path, monkeypatch):
    monkeypatch.setenv("UNRECURRENT_CACHE", str(tmp_path / "cache"))
    home = tmp_path / "billion-word"
    for folder, names in (
        ("training-monolingual.tokenized.shuffled", ["news.en-00002-of-00100", "news.en-00001-of-00100"]),
        ("heldout-monolingual.tokenized.shuffled", [f"news.en.heldout-{i:05}-of-00050" for i in range(3)]),
    ):
        (home / folder).mkdir(parents=True)
        for number, name in enumerate(names):
            (home / folder / name).write_text(f"The cat sat .\nOnly{number} The cat .\n", encoding="utf-8")
    task = get_task("billion-word", data_dir=tmp_path)
    assert sorted(task.words) == [".", "<eos>", "<unk>", "The", "cat"]
    train = [task.words[i] for i in task.load("train")[0].targets]
    assert train == ["The", "cat", "<unk>", ".", "<eos>", "<unk>", "The", "cat", ".", "<eos>"] * 2
    assert len(task.load("test")[0].targets) == len(task.load("valid")[0].targets) == 10
    (home / "heldout-monolingual.tokenized.shuffled" / "news.en.heldout-00000-of-00050").unlink()
    with pytest.raises(InputError, match="the test shards of 'billion-word' are missing"):
        get_task("billion-word", data_dir=tmp_path).load("test")


def test_perplexity_is_the_exponential_of_the_mean_loss():
    metric = Metric("ppl", "lower", "perplexity", exponential=True)
    assert metric.of(math.log(128)) == pytest.approx(128)
    assert math.isfinite(metric.of(1e6))


@pytest.mark.parametrize("sampled", [0, 6])
@pytest.mark.parametrize("softmax", ["float32", "bfloat16"])
def test_a_model_learns_the_text_and_resumes_bit_for_bit(home, tmp_path, sampled, softmax):
    task = get_task("wikitext-2", data_dir=home)
    settings = {"hidden_size": 12, "embedding_size": 8, "tied": True}
    large = {"sampled_words": sampled, "softmax": softmax, "frequency_bias": not sampled}
    config = TrainingConfig(epochs=12, learning_rate=0.02, batch_size=4, piece=7, **large)

    def run(folder):
        return TrainingRun(task, "lstm", settings, config, folder, checkpoint_steps=5)

    model = run(None).run()
    exact = evaluate(model, task, task.load("test"))
    assert exact < (0.85 if sampled else 0.6) * math.log(task.vocabulary)
    plain = torch.cat([task.loss(model(x[None].long()), y[None].long())[0] for x, y in task.load("test")])
    assert exact == pytest.approx(float(plain.detach().mean()), rel=1e-5)
    interrupted = run(tmp_path / "run")

    class Stop(Exception):
        pass

    def stop(state):
        if state["fraction"] > 0.4:
            raise Stop

    with pytest.raises(Stop):
        interrupted.run(stop)
    resumed = run(tmp_path / "run").run()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_biases_that_start_at_the_frequencies_predict_them(home, tmp_path):
    task = get_task("wikitext-2", data_dir=home)
    (stream,) = task.load("train")
    counts = word_counts(task, [stream])
    assert counts.tolist() == torch.bincount(stream.targets, minlength=task.outputs).tolist()
    settings = {"hidden_size": 12, "embedding_size": 8, "tied": True}
    config = TrainingConfig(epochs=1, learning_rate=1e-9, batch_size=4, piece=7, frequency_bias=True)
    model = TrainingRun(task, "lstm", settings, config).run()
    shares = counts.double() / counts.sum()
    entropy = -float((shares * shares.clamp(min=1e-9).log()).sum())
    assert evaluate(model, task, [stream]) == pytest.approx(entropy, abs=0.05)
    assert entropy < math.log(task.vocabulary) - 0.1


def test_a_long_corpus_is_mapped_and_not_held(home):
    text = LINES["train"] * 400
    (home / "ptb/ptb.train.txt").write_text(text, encoding="utf-8")
    inputs, targets = get_task("ptb", data_dir=home).load("train")[0]
    assert inputs.dtype == targets.dtype == torch.int32
    assert inputs.untyped_storage().data_ptr() == targets.untyped_storage().data_ptr()
    assert len(targets) == len(text.split()) + text.count("\n")


@pytest.mark.parametrize("name", ["lstm", "mingru", "window", "transformer", "ngram-lstm"])
def test_memory_is_measured_by_perplexity_without_all_logits(home, name):
    """Features stand in for logits: the losses are the model's, and k* is about the exponential of their mean."""
    task = get_task("ptb", data_dir=home)
    settings = {"hidden_size": 6, "embedding_size": 4, "tied": True}
    model = build_model(name, task_interface(task), settings).eval()
    profile = measure_on_task(model, task, memory_data(task), positions=10_000, longest=16, steps=40)
    assert profile.full == pytest.approx(evaluate(model, task, task.load("test")), rel=1e-5)
    assert profile.exponential
    assert profile.gradient_decay is not None
    assert bool(profile.layers) == model.recurrent
    k = profile.k(0.01)
    means = dict(zip(profile.ks, profile.losses.mean(1), strict=True))
    assert math.exp(means[k] - profile.full) <= 1.01


WITH_RECIPES = [
    "rnn",
    "certified-rnn",
    "mingru",
    "certified-lstm-plain",
    "certified-lstm-coupled",
    "tcn",
    "wavenet",
    "transformer",
    "ngram-lstm",
]


@pytest.mark.parametrize("name", WITH_RECIPES)
def test_every_model_has_a_recipe_for_words(home, name):
    task = get_task("ptb", data_dir=home)
    recipe = find_recipe(task, name)
    assert recipe.training.sampled_words
    assert default_parameters(task) == 257 * task.outputs + 526_000
    build_model(name, task_interface(task), recipe.settings)
