"""The command line: what a user types, what is printed where, and one sentence with exit code 2 for bad input."""

import json
import subprocess
import sys

import pytest

from command import run, save
from unrecurrent import cli, measuring
from unrecurrent.checkpoint import load_model
from unrecurrent.errors import InputError
from unrecurrent.models import Interface


@pytest.fixture
def checkpoint(story, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "checkpoint"
    words = ("train", f"text:{story}", "--model", "stable-rnn", "--out", folder, "--parameters", 4000, "--epochs", 1)
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "bits a character" in out
    return folder


def test_compare_prints_a_table_a_verdict_and_json(story, tmp_path, capsys, monkeypatch):
    words = (
        "compare",
        f"text:{story}",
        "--models",
        "rnn,window:k=2",
        "--seeds",
        1,
        "--parameters",
        4000,
        "--epochs",
        1,
    )
    words += ("--runs", tmp_path / "runs", "--report", tmp_path / "r.html", "--records", tmp_path / "r.json")
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "Does" in out
    assert "Cannot tell with 1 seed" in out
    assert (tmp_path / "r.html").exists()
    assert len(json.loads((tmp_path / "r.json").read_text())) == 2
    code, out, _ = run(capsys, monkeypatch, *words, "--json")
    assert json.loads(out)["verdict"]["answer"] == "cannot tell"


def test_training_resumes_and_certificate_is_shown(checkpoint, story, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "certify", checkpoint)
    assert code == 0
    assert "stable, rate" in out
    assert "Proved: leaving out inputs more than" in out
    code, out, _ = run(capsys, monkeypatch, "certify", checkpoint, "--json", "--eps", 0.001)
    assert json.loads(out)["horizon"] > 0
    words = ("train", f"text:{story}", "--model", "stable-rnn", "--out", checkpoint, "--parameters", 5000)
    code, _, err = run(capsys, monkeypatch, *words)
    assert code == 2
    assert "holds a run with other settings" in err


def test_a_model_of_symbols_is_certified_over_its_own_table(checkpoint, story, capsys, monkeypatch):
    for words in (("--data", f"text:{story}"), ("--input-bound", 1.0)):
        code, _, err = run(capsys, monkeypatch, "certify", checkpoint, *words)
        assert code == 2
        assert "a model of symbols is certified for all there are" in err


def test_behind_a_convolution_what_is_proved_is_said_of_what_it_passes_on(tmp_path, capsys, monkeypatch):
    folder = save(tmp_path / "model", "certified-lstm", Interface(None, 5, 5), "jsb", input_kernel=4)
    of_the_layers = load_model(folder)[0].certificate(input_bound=1.0).horizon(1e-2)
    code, out, _ = run(capsys, monkeypatch, "certify", folder, "--input-bound", 1.0)
    assert code == 0
    assert "when they reach the layer" in out
    assert f"Proved: leaving out inputs more than {of_the_layers + 3} steps back (3 of them in the convolution" in out


def test_the_report_of_measure_gets_its_folder_first(checkpoint, tmp_path, capsys, monkeypatch):
    def measured(*_given, **_more):
        assert (tmp_path / "new").is_dir()
        raise InputError("measured")

    monkeypatch.setattr(measuring, "measure_file", measured)
    code, _, err = run(capsys, monkeypatch, "measure", checkpoint, "--report", tmp_path / "new" / "r.html")
    assert code == 2
    assert "measured" in err
    code, _, err = run(capsys, monkeypatch, "measure", checkpoint, "--report", tmp_path)
    assert code == 2
    assert "is a folder: name a file" in err


def test_damaged_checkpoint_is_one_sentence(checkpoint, capsys, monkeypatch):
    (checkpoint / "model.safetensors").write_bytes(b"nothing")
    code, _, err = run(capsys, monkeypatch, "certify", checkpoint)
    assert code == 2
    assert "is damaged" in err


COPY = ("train", "copy:T=5", "--model", "lstm", "--out", "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compare", "chorals"), "did you mean 'chorales'"),
        (("compare", "jsb", "--models", "lstm,tnc"), "did you mean 'tcn'"),
        (("compare", "text:missing.txt"), "missing.txt"),
        (("train", "jsb", "--model", "lsmt", "--out", "x"), "did you mean 'lstm'"),
        (
            ("train", "copy:T=5", "--model", "lstm", "--out", "x", "--epochs", "inf"),
            "epochs must be positive and finite",
        ),
        ((*COPY, "--seed", 10**23), "seed must be smaller than"),
        ((*COPY, "--device", "meta"), "the device 'meta' cannot be used here"),
        (
            ("train", "copy:T=5", "--model", "lstm", "--out", "x", "--parameters", 0),
            "parameters must be a whole number",
        ),
        (
            ("train", "copy:T=5", "--model", "lstm:hidden_size=3", "--out", "x", "--parameters", 900),
            "give one of them",
        ),
        (("compare", "copy:T=5", "--parameters", 0), "parameters must be a whole number"),
        (("certify", "no-such-folder"), "is no checkpoint"),
        (("certify", "no-such-folder", "--eps", -3), "eps must be a positive number"),
        (("data", "get", "jbs"), "did you mean 'jsb'"),
    ],
)
def test_mistakes_are_one_sentence_with_exit_code_two(words, said, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 2
    assert said in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["unrecurrent", "compare", "chorals", "--debug"])
    with pytest.raises(ValueError, match="did you mean"):
        cli.main()


@pytest.mark.parametrize("content", [b"", b"\x00\x01binary\xff", b"\xff\xfe\x00"], ids=["empty", "binary", "not UTF-8"])
def test_unusable_text_files_are_one_sentence(content, tmp_path, capsys, monkeypatch):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    code, _, err = run(capsys, monkeypatch, "compare", f"text:{path}")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_data_list_and_check_speak_json(data_dir, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "data", "list", "--json")
    assert code == 0
    assert {file["task"] for file in json.loads(out)} >= {"chorales", "jsb", "ptb-char"}
    code, out, _ = run(capsys, monkeypatch, "data", "check", "jsb")
    assert code == 0
    assert "ready" in out


def test_data_check_fails_where_a_file_is_missing(tmp_path, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "data", "check", "jsb", "--data-dir", tmp_path)
    assert code == 1
    assert "missing" in out


def verbs():
    return [
        ["compare"],
        ["train"],
        ["certify"],
        ["measure"],
        ["lookback"],
        ["data", "list"],
        ["data", "get"],
        ["data", "check"],
    ]


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_help_shows_a_runnable_example(verb, capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, *verb, "--help")
    assert code == 0
    assert f"Example: unrecurrent {' '.join(verb)}" in " ".join(out.split())


def test_command_is_installed():
    shown = subprocess.run(
        [sys.executable, "-m", "unrecurrent.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "compare" in shown.stdout
