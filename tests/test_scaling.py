"""The benchmark of long sequences, on short ones: records of the common form, a drawing, and honest memory."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from unrecurrent.records import read_records

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read where Linux keeps it"
)
def test_it_measures_every_length_and_draws_it(tmp_path):
    out, drawn = tmp_path / "scaling.json", tmp_path / "scaling.svg"
    sizes = ["--longest", "256", "--rounds", "1", "--generate", "30", "--parameters", "20000"]
    program = [sys.executable, str(ROOT / "benchmarks" / "scaling.py")]
    models = ["--models", "window,transformer:window=null,transformer"]
    subprocess.run([*program, *models, *sizes, "--out", str(out), "--figure", str(drawn)], check=True)
    records = read_records(out)
    assert {(r["model"], r["window"]) for r in records} == {
        ("window", None),
        ("transformer", None),
        ("transformer", 64),
    }
    assert len(records) == 3 * (2 * 4 + 2)
    assert all(r["mean"] > 0 for r in records)
    assert max(r["params"] for r in records) < 1.05 * min(r["params"] for r in records)
    lines = [e for e in ElementTree.parse(drawn).getroot() if e.get("fill") == "none"]
    assert len(lines) == 4 * 3  # a line a model in each panel
