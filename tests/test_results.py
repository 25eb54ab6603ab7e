"""The published pages are what the records give, and the records follow the schema."""

import subprocess
import sys
from pathlib import Path

import pytest

from unrecurrent.records import read_records

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
