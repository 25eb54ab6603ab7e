"""Recordings as μ-law symbols: counts, coding, damaged files, and samples one can listen to."""

import wave

import numpy as np
import pytest
import torch

from unrecurrent import data
from unrecurrent.errors import InputError
from unrecurrent.models import Interface, build_model
from unrecurrent.sampling import sample_levels, sample_many, sample_wav
from unrecurrent.tasks import SPLITS, get_task
from unrecurrent.tasks.waveforms import LOUDEST, decode, encode, read_wav, write_wav


def test_digits_have_the_published_counts(data_dir):
    if not (data_dir / "digits").is_dir():
        pytest.skip("digits is not in the data folder")
    assert [file.state for file in data.check("digits", data_dir)] == ["ready"]
    task = get_task("digits", data_dir=data_dir)
    loaded = {split: task.load(split) for split in SPLITS}
    assert [len(loaded[split]) for split in SPLITS] == [400, 50, 50]
    # takes 0 to 4 of each digit, one digit after another, are the official test set
    assert [int(e.inputs[0, 1:].argmax()) for e in loaded["test"]] == [digit for digit in range(10) for _ in range(5)]
    first = read_wav(data_dir / "digits" / "0_jackson_0.wav")
    assert torch.equal(loaded["test"][0].targets, torch.from_numpy(first))
    inputs = loaded["test"][0].inputs
    assert torch.equal(((inputs[1:, 0] + 1) / 2 * 255).round().long(), loaded["test"][0].targets[:-1])
    assert torch.equal(inputs[:, 1:], torch.eye(10)[:1].expand(len(inputs), -1))  # a zero, said at every step


def test_speech_has_the_published_counts(data_dir):
    if not (data_dir / "speech").is_dir():
        pytest.skip("speech is not in the data folder")
    assert [file.state for file in data.check("speech", data_dir)] == ["ready"]
    task = get_task("speech", data_dir=data_dir)
    assert sum(len(e.inputs) + 1 for split in SPLITS for e in task.load(split)) == 1_819_112


def test_levels_are_those_of_the_formula():
    x = np.linspace(-1, 1, 4001)
    by_hand = [np.sign(v) * np.log(1 + 255 * abs(v)) / np.log(256) for v in x]
    assert encode(x).tolist() == [int(np.floor((f + 1) / 2 * 255 + 0.5)) for f in by_hand]
    assert (np.abs(decode(encode(x)) - x) <= 0.022 * np.abs(x) + 1e-3).all()


def test_what_is_written_is_read_again(tmp_path):
    levels = np.arange(256)
    write_wav(tmp_path / "all.wav", levels)
    assert read_wav(tmp_path / "all.wav").tolist() == levels.tolist()


def record(path, samples, rate=8_000, channels=1, width=2):
    path.parent.mkdir(exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(np.asarray(samples).astype("<i2").tobytes())


def damaged(path, kind):
    tone = np.sin(np.arange(400)) * 0.5 * LOUDEST
    forms = {"at 16 kHz": {"rate": 16_000}, "stereo": {"channels": 2}, "8 bit": {"width": 1}}
    record(path, [] if kind == "empty" else tone, **forms.get(kind, {}))
    whole = path.read_bytes()
    if kind.startswith("cut"):
        path.write_bytes(whole[: int(kind.split()[1])])
    elif kind == "html":
        path.write_bytes(b"<html>not found</html>" * 9)


@pytest.mark.parametrize(
    "kind", ["at 16 kHz", "stereo", "8 bit", "empty", "cut 0", "cut 20", "cut 50", "cut 501", "html"]
)
def test_damaged_recordings_are_one_sentence(kind, tmp_path):
    damaged(tmp_path / "x.wav", kind)
    with pytest.raises(InputError) as error:
        read_wav(tmp_path / "x.wav")
    assert str(tmp_path / "x.wav") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_recording_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="unrecurrent data get digits"):
        get_task("digits", data_dir=tmp_path).load("test")
    with pytest.raises(InputError, match="unrecurrent data get speech"):
        get_task("speech", data_dir=tmp_path).load("test")
    record(tmp_path / "speech" / "one.wav", [1, 2, 3])
    with pytest.raises(InputError, match="at least 8"):
        get_task("speech", data_dir=tmp_path).load("test")


def test_speech_splits_its_recordings_by_name(tmp_path):
    for number in range(16):
        record(tmp_path / "speech" / f"{number}.wav", [number * 1000] * 10)
    task = get_task("speech", data_dir=tmp_path)
    found = [task.load(split)[0] for split in SPLITS]
    assert [len(e.inputs) + 1 for e in found] == [120, 20, 20]
    levels = torch.cat([torch.cat([e.inputs[:1], e.targets]) for e in found])
    assert len(levels.unique()) == 16
    assert data.check("speech", tmp_path)[0].state == "missing"


def test_bits_of_a_guess_are_eight():
    task = get_task("digits")
    loss = task.loss(torch.zeros(1, 3, 256), torch.tensor([[0, 128, 255]]))
    assert task.metric.of(float(loss.mean())) == pytest.approx(8.0)


def test_a_trained_model_speaks(tmp_path):
    model = build_model("gru", Interface(None, 11, 256), {"hidden_size": 8})
    first, again, other = (sample_levels(model, 50, digit=7, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()
    both = sample_many(model, 50, [7, 3], seed=1)
    assert both.shape == (2, 50)
    assert both[0].tolist() != both[1].tolist()
    with torch.no_grad():
        model.readout.bias[77] = 1e3
    assert set(sample_levels(model, 9, digit=0).tolist()) == {77}
    sample_wav(model, tmp_path / "seven.wav", seconds=0.25, digit=7)
    assert read_wav(tmp_path / "seven.wav").tolist() == [77] * 2_000


def test_what_cannot_be_sampled_is_one_sentence(tmp_path):
    music = build_model("gru", Interface(None, 88, 88), {"hidden_size": 4})
    with pytest.raises(InputError, match="only a model trained on waveforms"):
        sample_levels(music, 5)
    sound = build_model("gru", Interface(256, None, 256), {"hidden_size": 4})
    for settings in ({"steps": 0}, {"steps": 2.5}, {"temperature": 0.0}):
        with pytest.raises(InputError, match="steps must be a whole number of at least 1, temperature above 0"):
            sample_levels(sound, **{"steps": 5, **settings})
    with pytest.raises(InputError, match="knows no digits"):
        sample_levels(sound, 5, digit=3)
    digits = build_model("gru", Interface(None, 11, 256), {"hidden_size": 4})
    with pytest.raises(InputError, match="such as digit=7"):
        sample_levels(digits, 5)
    with pytest.raises(InputError, match="no digit"):
        sample_levels(digits, 5, digit=10)
    with pytest.raises(InputError, match="digits not empty"):
        sample_many(digits, 5, [])
    with pytest.raises(InputError, match="no digit"):
        sample_levels(digits, 5, digit=True)
    with pytest.raises(InputError, match="seconds must be"):
        sample_wav(sound, tmp_path / "x.wav", seconds=float("nan"))
    assert len(sample_levels(sound, 3, temperature=1e-310)) == 3
    with pytest.raises(InputError, match="cannot write"):
        sample_wav(sound, tmp_path / "no" / "folder.wav", seconds=0.001)
