"""The published pages are what the records give, and the records follow the schema."""

import copy
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from unrecurrent.records import Record, read_records

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "results").rglob("*.json"))


def test_pages_are_generated_from_the_records():
    made = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "results_page.py"), "--check"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_records_say_where_they_come_from(path):
    for record in read_records(path):
        assert record["command"]
        assert record["machine"]
        assert record["date"]
        assert record["commit"]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.fixture
def words_page(monkeypatch):
    """The page of WikiText-2 as a module, which finds its neighbours in benchmarks/."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("wikitext2_page")


def own_row(shared: list[Record], dropout: float, valid: float, test: float) -> list[Record]:
    record = copy.deepcopy(shared[0])
    record["settings"] |= {"dropout": dropout, "input_dropout": dropout}
    return [record | {"table": "own settings", "valid_mean": valid, "mean": test}]


def test_own_settings_are_chosen_on_validation_and_compared_where_both_tried_them(words_page):
    done = words_page.records()
    lstm, stable = ([done[row][0] | {"mean": test}] for row, test in (("lstm-3", 117.7), ("stable-lstm-3", 164.9)))
    shared = {"lstm-3": lstm, "stable-lstm-3": stable}
    own = {
        "a": own_row(lstm, 0.1, 100.0, 90.0),
        "b": own_row(lstm, 0.2, 99.0, 98.0),
        "c": own_row(stable, 0.1, 120.0, 49.0),
    }
    unlike = words_page.own_settings({**shared, **own})
    assert "| `lstm` | 0.2 | 0.004 | 0 | 16‡ | 99.0 | **98.0** | 117.7 |" in unlike
    assert "%" not in unlike
    own["e"] = own_row(lstm, 0.3, 101.0, 80.0)  # no better, so that it need not be tried by both
    alike = words_page.own_settings({**shared, **own, "d": own_row(stable, 0.2, 130.0, 80.0)})
    assert "| `stable-lstm` | 0.1 | 0.004 | 0 | 14 | 120.0 | **49.0** | 164.9 | -50.0 % | +40.1 % |" in alike


def test_own_settings_differ_in_nothing_else(words_page):
    done = words_page.records()
    stray = own_row(done["certified-lstm-0.995"], 0.1, 1.0, 1.0)
    other = own_row(done["certified-lstm-0.98"], 0.1, 1.0, 1.0)
    with pytest.raises(ValueError, match="y differs from the other rows of its model"):
        words_page.own_settings({**done, "x": stray, "y": other})
    stray[0]["settings"]["hidden_size"] = 7
    with pytest.raises(ValueError, match="not enough values"):
        words_page.own_settings({**done, "x": stray})
