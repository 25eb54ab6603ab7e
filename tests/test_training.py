"""The training loop: it learns, it resumes bit for bit after SIGKILL, and damage gives one clear sentence."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unrecurrent import files
from unrecurrent.batches import length_groups, stream_batches
from unrecurrent.checkpoint import TRAINING, load_model, load_tensors, save_tensors
from unrecurrent.errors import InputError
from unrecurrent.models import Interface, build_model
from unrecurrent.training import TrainingConfig, TrainingRun, evaluate, make_optimizer, task_interface

QUICK = TrainingConfig(epochs=3, learning_rate=1e-2, batch_size=3, piece=20)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "plateau"])
def test_training_lowers_the_loss(tiny_music, optimizer, schedule):
    config = replace(
        QUICK, epochs=12, optimizer=optimizer, schedule=schedule, learning_rate={"adamw": 0.03, "sgd": 0.5}[optimizer]
    )
    run = TrainingRun(tiny_music, "lstm", {"hidden_size": 16}, config)
    model = run.run()
    history = run.progress.history
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert evaluate(model, tiny_music, tiny_music.load("valid")) == pytest.approx(run.progress.best_loss, rel=1e-6)


@pytest.mark.parametrize("name", ["gru", "tcn"])
def test_streams_are_learnt_with_carried_state(tiny_stream, name):
    config = replace(QUICK, epochs=15, learning_rate=0.03)
    run = TrainingRun(tiny_stream, name, {"hidden_size": 16, "embedding_size": 8}, config)
    run.run()
    assert run.progress.best_loss < 0.1


def test_early_stopping_keeps_the_best_weights(tiny_music):
    config = replace(QUICK, epochs=50, learning_rate=0.5, patience=2, clip_norm=100.0)
    run = TrainingRun(tiny_music, "window", {"hidden_size": 8, "k": 1}, config)
    model = run.run()
    valid = [record["valid_loss"] for record in run.progress.history]
    assert len(valid) < 50
    assert evaluate(model, tiny_music, tiny_music.load("valid")) == pytest.approx(min(valid), rel=1e-6)


def test_every_step_of_a_split_counts_once(tiny_stream):
    (example,) = tiny_stream.load("test")
    batches = list(stream_batches(example, 4, 10, whole=True))
    assert sum(batch.steps for batch in batches) == len(example.inputs)
    seen = torch.cat([b.targets[b.mask] if b.mask is not None else b.targets.flatten() for b in batches])
    assert torch.equal(seen.bincount(), example.targets.bincount())


def test_groups_hold_every_sequence_once_and_differ_between_epochs():
    lengths = [5, 9, 5, 5, 7, 9, 5, 7]
    one = length_groups(lengths, 3, torch.Generator().manual_seed(1))
    two = length_groups(lengths, 3, torch.Generator().manual_seed(2))
    assert sorted(i for group in one for i in group) == list(range(8))
    assert one != two


JOB = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from conftest import TinyMusic, TinyStream
from unrecurrent.training import TrainingConfig, TrainingRun
torch.set_num_threads(1)
task = TinyMusic() if sys.argv[3] == "music" else TinyStream()
own = {} if sys.argv[3] == "music" else {"recurrent_learning_rate_factor": 0.5, "recurrent_weight_decay": 0.1}
config = TrainingConfig(epochs=5.5, learning_rate=1e-2, batch_size=3, piece=20, schedule="cosine", **own)
settings = {"hidden_size": 12, "dropout": 0.3}
run = TrainingRun(task, sys.argv[4], settings, config, Path(sys.argv[1]), checkpoint_steps=4)
run.run(lambda state: (print(state["fraction"], flush=True), time.sleep(0.01)))
"""


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("music", "certified-rnn"),
        ("music", "certified-lstm"),
        ("stream", "gru"),
        ("stream", "stable-lstm"),
        ("stream", "certified-lstm-plain"),
    ],
)
def test_killed_training_resumes_to_the_same_weights(tmp_path, kind, model):
    here = str(Path(__file__).parent)
    interrupted, straight = tmp_path / "interrupted", tmp_path / "straight"
    command = [sys.executable, "-c", JOB, str(interrupted), here, kind, model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if float(line) > 0.55:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert (interrupted / "training.safetensors").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    command[3] = str(straight)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in ("model.safetensors", "training.safetensors"):
        resumed, _ = load_tensors(interrupted / name)
        once, _ = load_tensors(straight / name)
        assert resumed.keys() == once.keys()
        assert all(torch.equal(resumed[key], once[key]) for key in once)
    logs = [
        [
            (r["epoch"], r["train_loss"], r["valid_loss"])
            for r in map(json.loads, (f / "log.jsonl").read_text().splitlines())
        ]
        for f in (interrupted, straight)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 6


@pytest.mark.parametrize(("epochs", "passes"), [(0.4, [0.4]), (2.5, [1, 2, 2.5]), (2, [1, 2])])
def test_the_last_pass_may_be_cut_short(tiny_music, epochs, passes):
    run = TrainingRun(tiny_music, "rnn", {"hidden_size": 4}, replace(QUICK, epochs=epochs, batch_size=1))
    run.run()
    sequences = len(tiny_music.load("train"))
    assert [record["step"] for record in run.progress.history] == [round(share * sequences) for share in passes]
    assert run.learning_rate() == QUICK.learning_rate


def finished_run(task, folder):
    run = TrainingRun(task, "rnn", {"hidden_size": 4}, QUICK, folder)
    return run.run()


def test_checkpoint_loads_as_trained(tmp_path, tiny_music):
    model = finished_run(tiny_music, tmp_path)
    loaded, config = load_model(tmp_path)
    assert config["task"] == "tiny-music"
    assert config["training"]["epochs"] == 3
    inputs = torch.rand(1, 5, 5)
    assert torch.equal(loaded(inputs), model(inputs))


def test_finished_run_is_not_trained_again(tmp_path, tiny_music):
    finished_run(tiny_music, tmp_path)
    run = TrainingRun(tiny_music, "rnn", {"hidden_size": 4}, QUICK, tmp_path)
    run.run(lambda _: pytest.fail("a finished run trained on"))
    assert run.progress.epoch == 3


def test_folder_of_another_run_is_refused(tmp_path, tiny_music):
    finished_run(tiny_music, tmp_path)
    with pytest.raises(InputError, match="holds a run with other settings"):
        TrainingRun(tiny_music, "rnn", {"hidden_size": 5}, QUICK, tmp_path).run()


def test_a_run_begun_before_a_setting_existed_goes_on(tmp_path, tiny_music):
    finished_run(tiny_music, tmp_path)
    tensors, about = load_tensors(tmp_path / TRAINING)
    del about["interface"]["separator"], about["training"]["softmax"]
    save_tensors(tmp_path / TRAINING, tensors, about)
    finished_run(tiny_music, tmp_path)
    save_tensors(tmp_path / TRAINING, tensors, {**about, "training": {**about["training"], "softmax": "bfloat16"}})
    with pytest.raises(InputError, match="holds a run with other settings"):
        finished_run(tiny_music, tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "garbage"])
def test_damaged_checkpoint_is_one_sentence(tmp_path, tiny_music, damage):
    finished_run(tiny_music, tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    changed = {"flip": data, "truncate": data[: len(data) // 2], "empty": b"", "garbage": b"x" * 100}[damage]
    path.write_bytes(changed)
    with pytest.raises(InputError, match="is damaged"):
        load_model(tmp_path)


def test_missing_checkpoint_and_broken_config_are_one_sentence(tmp_path, tiny_music):
    with pytest.raises(InputError, match="is no checkpoint"):
        load_model(tmp_path)
    finished_run(tiny_music, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, ["model", "interface", "settings", "task"]),
        (None, 3),
        ("model", 3),
        ("task", None),
        ("settings", []),
        ("interface", {}),
        ("interface", []),
        ("interface", {"vocabulary": None, "features": None, "outputs": 5}),
        ("interface", {"vocabulary": -6, "features": None, "outputs": 6}),
        ("interface", {"vocabulary": None, "features": "5", "outputs": 5}),
        ("interface", {"vocabulary": None, "features": 5, "outputs": None}),
        ("interface", {"vocabulary": None, "features": 5, "outputs": 5, "separator": -1}),
        ("interface", {"vocabulary": None, "features": 5, "outputs": 5, "colour": 1}),
        ("scales", [1.0]),
        ("scales", {"mean": [0.0], "std": ["1"]}),
    ],
)
def test_config_of_the_wrong_form_is_one_sentence(key, value, tmp_path):
    config = {"model": "gru", "interface": Interface(None, 5, 5)._asdict(), "settings": {}, "task": "tiny-music"}
    (tmp_path / "config.json").write_text(json.dumps(value if key is None else {**config, key: value}))
    with pytest.raises(InputError, match=r"config.json is damaged \(.*\): restore or delete") as raised:
        load_model(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


def test_more_outputs_than_memory_holds_are_one_sentence(tmp_path, tiny_music):
    finished_run(tiny_music, tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "interface": {**about["interface"], "outputs": 2**50}}))
    with pytest.raises(InputError, match=r"do not fit its config\.json"):
        load_model(tmp_path)


def test_full_disk_overwrites_nothing(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {})
    before = path.read_bytes()

    def no_space(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_flush_to_disk", no_space)
    with pytest.raises(InputError, match=r"No space left on device.*nothing was overwritten"):
        save_tensors(path, {"a": torch.zeros(3)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_diverging_training_says_so(tiny_music):
    class Broken(type(tiny_music)):
        def loss(self, outputs, targets):
            return super().loss(outputs, targets) * float("nan")

    with pytest.raises(InputError, match="became nan at step 0: lower the learning rate"):
        TrainingRun(Broken(), "rnn", {"hidden_size": 4}, QUICK).run()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lion"),
        ("schedule", "linear"),
        ("epochs", 0),
        ("epochs", float("inf")),
        ("epochs", "many"),
        ("learning_rate", -1.0),
        ("seed", -1),
        ("seed", 0.5),
        ("seed", 2**32),
        ("recurrent_learning_rate_factor", 0.0),
        ("weight_decay", -0.1),
        ("recurrent_weight_decay", -0.1),
    ],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        TrainingConfig(**{field: value})


def test_the_largest_seed_is_taken(tiny_music):
    TrainingRun(tiny_music, "rnn", {"hidden_size": 4}, replace(QUICK, epochs=1, seed=2**32 - 1)).run()


@pytest.mark.parametrize("device", ["toaster", "cpu:x", "meta", "cuda:99", "xla", "hpu"])
def test_a_device_that_is_not_there_is_one_sentence(device, tiny_music):
    with pytest.raises(InputError, match=r"unknown device|cannot be used here") as raised:
        TrainingRun(tiny_music, "rnn", {"hidden_size": 4}, QUICK, device=device)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_recurrent_layers_may_learn_at_a_rate_of_their_own(tiny_music, optimizer):
    """At almost none they stay where they started, while the rest of the model learns."""
    settings = {"hidden_size": 6}
    config = replace(QUICK, epochs=1, optimizer=optimizer, recurrent_learning_rate_factor=1e-9)
    torch.manual_seed(config.seed)
    start = build_model("gru", task_interface(tiny_music), settings).state_dict()
    trained = TrainingRun(tiny_music, "gru", settings, config).run().state_dict()
    for name, weights in trained.items():
        assert torch.allclose(weights, start[name], atol=1e-7) == name.startswith("recurrence."), name


@pytest.mark.parametrize("own", [{"recurrent_learning_rate_factor": 0.5}, {"recurrent_weight_decay": 0.0}])
def test_rates_for_recurrent_layers_need_some(tiny_music, own):
    with pytest.raises(InputError, match=r"must be left out for TCN: .* holds no recurrent layer"):
        TrainingRun(tiny_music, "tcn", {"hidden_size": 4}, replace(QUICK, **own)).run()


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_recurrent_layers_may_decay_at_a_rate_of_their_own(factor):
    """At a rate of learning that moves nothing, a decay of 1 / rate takes all of a weight off in one step."""
    model = build_model("lstm", Interface(7, None, 7), {"hidden_size": 5, "embedding_size": 5, "tied": True})
    start = {name: weights.clone() for name, weights in model.state_dict().items()}
    own = {"recurrent_learning_rate_factor": factor, "recurrent_weight_decay": 1e9 / factor}
    optimizer = make_optimizer(model, TrainingConfig(learning_rate=1e-9, weight_decay=0.5e9, **own))
    model(torch.arange(7)[None]).square().sum().backward()
    optimizer.step()
    for name, weights in model.state_dict().items():
        left = 0 if name.startswith("recurrence.") else 0.5
        torch.testing.assert_close(weights, left * start[name], atol=1e-8, rtol=0)


def test_a_field_that_changes_nothing_does_not_make_another_training():
    assert not {"recurrent_learning_rate_factor", "recurrent_weight_decay"} & set(QUICK.identity())
    assert replace(QUICK, recurrent_weight_decay=0.0).identity() != QUICK.identity()
    assert replace(QUICK, recurrent_learning_rate_factor=0.5).identity() != QUICK.identity()
    assert replace(QUICK, clip_norm=0.5).identity() != QUICK.identity()


def test_training_leaves_the_callers_generator_alone(tiny_music):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    finished_run(tiny_music, None)
    assert torch.equal(torch.rand(1), expected)


def test_log_and_tensorboard_hold_every_epoch(tmp_path, tiny_music):
    pytest.importorskip("tensorboard", reason="install tensorboard to run this test")
    finished_run(tiny_music, tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in records] == [1, 2, 3]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"valid_loss" in events.read_bytes()


def test_killed_between_its_two_files_a_run_heals(tmp_path, tiny_music):
    finished_run(tiny_music, tmp_path)
    expected = load_tensors(tmp_path / "model.safetensors")[0]
    partial = tmp_path / "partial"

    def broken(*_args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unrecurrent.training.save_tensors", broken)
        with pytest.raises(KeyboardInterrupt):
            finished_run(tiny_music, partial)
    finished_run(tiny_music, partial)
    healed = load_tensors(partial / "model.safetensors")[0]
    assert all(torch.equal(healed[name], expected[name]) for name in expected)


def test_training_on_other_data_is_another_run(tmp_path, tiny_music):
    finished_run(tiny_music, tmp_path)

    class Changed(type(tiny_music)):
        def load(self, split):
            return super().load(split)[1:]

    with pytest.raises(InputError, match="holds a run with other settings"):
        finished_run(Changed(), tmp_path)
