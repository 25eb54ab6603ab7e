"""The `measure` verb: checkpoints on tasks, texts and arrays, ONNX files, and one sentence for what does not fit."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from command import run, save
from unrecurrent.checkpoint import load_config
from unrecurrent.errors import InputError
from unrecurrent.measuring import _scaled, load_arrays, measure_file
from unrecurrent.models import Interface
from unrecurrent.tasks import get_task
from unrecurrent.training import TrainingConfig, TrainingRun


def header(shape):
    """The first bytes of a .npy file that says it holds an array of that shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue()


SMALL = {"positions": 30, "longest": 24, "steps": 40}
ROOT = Path(__file__).parents[1]


@pytest.fixture
def reader(tmp_path, story):
    symbols = len(set("a fox met a crow. ")) + 1
    return save(tmp_path / "reader", "gru", Interface(symbols, None, symbols), f"text:{story}")


@pytest.fixture
def regressor(tmp_path):
    return save(tmp_path / "regressor", "lstm", Interface(None, 2, 3), "series")


def test_checkpoint_is_measured_on_its_own_task(reader, tmp_path, capsys, monkeypatch):
    words = ("measure", reader, "--positions", 30, "--longest", 16, "--steps", 40, "--report", tmp_path / "m.html")
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "k*(1 %)" in out
    assert "Lyapunov exponents" in out
    assert (tmp_path / "m.html").stat().st_size > 1_000_000
    code, out, _ = run(capsys, monkeypatch, *words[:-2], "--json")
    ((name, profile),) = json.loads(out).items()
    assert name == "reader"
    assert profile["label"] == "estimate"


def test_checkpoint_is_measured_on_another_text_in_its_own_symbols(reader, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("foxes meet crows at times. " * 20, encoding="utf-8")
    (profile,) = measure_file(reader, str(other), **SMALL).values()
    assert len(profile.full_losses) == 30


@pytest.mark.parametrize("shape", [(60, 2), (3, 30, 2)])
def test_inputs_alone_are_judged_by_the_change_of_the_outputs(regressor, shape, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=shape))
    (profile,) = measure_file(regressor, str(tmp_path / "x.npy"), **SMALL).values()
    assert profile.full == pytest.approx(0, abs=1e-10)
    assert profile.scale > 0
    assert 1 < profile.k(0.001) <= 24
    assert profile.gradient_decay.mean[0] > 0


def test_columns_of_a_csv_are_inputs(regressor, tmp_path):
    rows = "\n".join(f"2020-01-{1 + i % 28:02},{np.sin(i)},{i % 5}" for i in range(50))
    (tmp_path / "x.csv").write_text(f"date,a,b\n{rows}\n", encoding="utf-8")
    assert load_arrays(tmp_path / "x.csv").shape == (50, 2)
    (profile,) = measure_file(regressor, str(tmp_path / "x.csv"), **SMALL).values()
    assert len(profile.full_losses) == 30


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.npy", np.zeros((9, 3)), "reads 2 features"),
        ("x.npy", np.zeros((2, 2, 9, 2)), "but the model reads"),
        ("x.npy", np.zeros((0, 2)), "is empty"),
        ("x.npy", np.full((9, 2), np.nan), "NaN or infinite"),
        ("x.npz", {"a": np.zeros((9, 2))}, "reads one array"),
        ("x.npy", b"nothing", "cannot be read as numbers"),
        ("x.npz", b"PK\x03\x04 and then nothing", "cannot be read as numbers"),
        ("x.npy", header((10**13, 2)), "cannot be read as numbers"),
        ("x.npy", np.array([["a", "b"]]), "holds <U1, not real numbers"),
        ("x.npy", np.ones((9, 2), complex), "holds complex128, not real numbers"),
        ("x.npz", {"a": np.array(["b"])}, "the array 'a' of .* holds <U1"),
        ("x.npy", np.full((9, 2), 1e300), "NaN or infinite"),
        ("x.csv", b"a,b\nyes,no\nno,yes\n", "has no column of numbers"),
        ("none.npy", None, "there is no file"),
        ("x.csv", b"a,b\n1,2\n3,\n", "line 3"),
        ("chorals", None, "did you mean 'chorales'"),
    ],
)
def test_data_that_do_not_fit_are_one_sentence(name, content, said, regressor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif isinstance(content, dict):
        np.savez(name, **content)
    elif content is not None:
        np.save(name, content)
    with pytest.raises(InputError, match=said) as raised:
        measure_file(regressor, name, **SMALL)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("symbol", [-1, 2**63])
def test_numbers_that_are_no_symbols_are_refused(symbol, reader, tmp_path):
    symbols = np.zeros(20, np.int64 if symbol < 0 else np.uint64)
    symbols[7] = symbol
    np.save(tmp_path / "x.npy", symbols)
    with pytest.raises(InputError, match="symbols are numbered from 0"):
        measure_file(reader, str(tmp_path / "x.npy"), **SMALL)


def tide(path, scale=1.0):
    rows = "\n".join(f"{scale * np.sin(t / 3)},{scale * np.cos(t / 5)}" for t in range(300))
    path.write_text(f"other,level\n{rows}\n", encoding="utf-8")
    return path


def test_targets_of_another_width_are_refused(regressor, tmp_path):
    tide(tmp_path / "tide.csv")
    task = f"series:{tmp_path / 'tide.csv'}?target=level&covariates=other&horizon=4"
    with pytest.raises(InputError, match="has 4 targets a step, but the model predicts 3"):
        measure_file(regressor, task, **SMALL)


def test_a_forecaster_reads_raw_columns_in_its_own_scale(tmp_path):
    """The same readings in other units give the same profile, once a model of each has its own scale."""
    found = []
    for scale in (1.0, 1000.0):
        file = tide(tmp_path / "tide.csv", scale)
        task = get_task(f"series:{file}?target=level&covariates=other")
        folder = tmp_path / f"run {scale}"
        TrainingRun(task, "lstm", {"hidden_size": 4}, TrainingConfig(epochs=1), folder).run()
        assert load_config(folder)["scales"]["std"][0] == pytest.approx(0.707 * scale, rel=0.05)
        raw = np.stack([np.cos(np.arange(300) / 5), np.sin(np.arange(300) / 3)], 1) * scale
        np.save(tmp_path / "raw.npy", raw)
        (profile,) = measure_file(folder, str(tmp_path / "raw.npy"), **SMALL).values()
        found.append(profile)
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-3, atol=1e-9)


def test_raw_columns_far_from_zero_keep_their_digits():
    scales = {"mean": [1e8], "std": [1.0]}
    x = 1e8 + np.arange(5.0)[:, None]
    assert np.array_equal(_scaled(x, scales), np.arange(5.0)[:, None])


def test_symbols_and_features_are_not_mixed_up(reader, regressor, tmp_path, story):
    np.save(tmp_path / "large.npy", np.full(50, 99))
    with pytest.raises(InputError, match="at least 100 symbols"):
        measure_file(reader, str(tmp_path / "large.npy"), **SMALL)
    with pytest.raises(InputError, match="features"):
        measure_file(regressor, f"text:{story}", **SMALL)


def test_onnx_file_on_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the package onnxruntime")
    onnx = pytest.importorskip("onnx", reason="needs the package onnx")
    from test_onnx_graph import node_model

    onnx.save(node_model("GRU", scale=0.1), tmp_path / "gru.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(90, 1, 4)))
    words = ("measure", tmp_path / "gru.onnx", "--data", tmp_path / "x.npy", "--positions", 20, "--steps", 30)
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "recurrence" in out
    code, out, _ = run(capsys, monkeypatch, "certify", tmp_path / "gru.onnx", "--data", tmp_path / "x.npy", "--json")
    assert code == 0
    assert json.loads(out)["stable"]
    code, out, _ = run(capsys, monkeypatch, "certify", tmp_path / "gru.onnx", "--input-bound", 3)
    assert "Proved: leaving out the layer's own inputs more than" in out
    code, out, err = run(capsys, monkeypatch, "measure", tmp_path / "gru.onnx")
    assert code == 2
    assert "add --data" in err
    assert len(err.strip().splitlines()) == 1
    code, _, err = run(capsys, monkeypatch, "measure", tmp_path / "gru.onnx", "--data", "jsb")
    assert code == 2
    assert "reads arrays" in err


def test_exponents_are_a_number_or_all(reader, capsys, monkeypatch):
    code, _, err = run(capsys, monkeypatch, "measure", reader, "--exponents", "many")
    assert code == 2
    assert "whole number or all" in err
    code, _, err = run(capsys, monkeypatch, "measure", reader, "--seed", -1)
    assert code == 2
    assert "greater than or equal to 0" in err


def test_help_shows_a_runnable_example(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "measure", "--help")
    assert code == 0
    assert "Example: unrecurrent measure" in " ".join(out.split())


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/measuring.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    exec(compile(example, "docs/measuring.md", "exec"), {})
    assert Path("memory.html").is_file()
